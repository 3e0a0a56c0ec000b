"""How the cores' time went, from ``/proc/stat``: all of it, what was busy, and what this process had of that."""

from pathlib import Path
from typing import NamedTuple

from fleetune.device_runtime.rules.sysfs import read_text

_IDLE, _IOWAIT, _COUNTED = 3, 4, 8
"""Columns of a cpu line; guest time is counted in user time already."""
_USER_TIME, _SYSTEM_TIME = 11, 12
"""Columns of /proc/self/stat after the name in brackets."""


class Ticks(NamedTuple):
    """Clock ticks since the machine started (10 ms each as a rule)."""

    total: int
    busy: int
    own: int
    num_cores: int

    def others_since(self, before: "Ticks") -> float:
        """Share of the time between that other processes took; NaN where the counters went backwards."""
        total = self.total - before.total
        others = self.busy - before.busy - (self.own - before.own)
        return min(1.0, max(0.0, others / total)) if total > 0 else float("nan")


def read_ticks(root: Path) -> Ticks | None:
    """The counters now; None if they are missing or malformed."""
    lines = [line.split() for line in read_text(root / "proc/stat").splitlines() if line.startswith("cpu")]
    own = read_text(root / "proc/self/stat").rpartition(")")[2].split()
    try:
        spent = [int(cell) for cell in lines[0][1 : 1 + _COUNTED]]
        idle = spent[_IDLE] + spent[_IOWAIT]
        mine = int(own[_USER_TIME]) + int(own[_SYSTEM_TIME])
    except (IndexError, ValueError):
        return None
    return Ticks(sum(spent), sum(spent) - idle, mine, max(1, len(lines) - 1))
