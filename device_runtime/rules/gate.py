"""The gate between steps: shut while a rule forbids training, with hysteresis; no thread, and a clock from outside."""

import logging
import math
import os
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.rules.rules import Reading, Rules, reasons
from fleetune.device_runtime.rules.rules_file import load_rules
from fleetune.device_runtime.rules.sensors import sensors_of

log = logging.getLogger(__name__)

_NAP_MIN_S = 0.05


class Pause(NamedTuple):
    """The gate shut, for other reasons than before perhaps, or (without reasons) opened after ``seconds``."""

    reasons: Mapping[str, str]
    """A sentence by the rule that forbids training."""
    seconds: float
    """Since it shut."""

    def __str__(self) -> str:
        return (
            "paused: " + "; ".join(self.reasons.values())
            if self.reasons
            else f"resumed after {self.seconds:.0f} s"
        )


class Gate:
    """Ask ``is_open`` before every step, or ``wait``: between two readings of the sensors that costs a comparison."""

    def __init__(
        self,
        rules: Rules,
        read: Callable[[], Reading],
        *,
        on_change: Callable[[Pause], object] | None = None,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], object] = time.sleep,
    ) -> None:
        """Prepare; without rules it is always open.

        Args:
            rules: when training is allowed.
            read: reads the sensors; called every ``rules.period_s`` at most.
            on_change: told when it shuts, when the rules that keep it shut are others, and when it opens.
            clock: seconds of a monotonic clock; ``wait`` only.
            sleep: ``wait`` only.
        """
        self.reasons: dict[str, str] = {}
        """Why it is shut, by rule; empty while it is open."""
        self.num_pauses = 0
        self._rules, self._read, self._on_change = rules, read, on_change or (lambda _: None)
        self._clock, self._sleep = clock, sleep
        self._is_asked = bool(rules.asked)
        self._looked_at = self._due = float("-inf")
        self._shut_at = self._forbidden_at = 0.0
        self._paused_s = 0.0
        self._warned: set[tuple[str, bool]] = set()

    @property
    def text(self) -> str:
        """Why it is shut, on one line; empty while it is open."""
        return "; ".join(self.reasons.values())

    @property
    def paused_s(self) -> float:
        """Seconds in pauses, up to the last look."""
        return self._paused_s + (self._looked_at - self._shut_at if self.reasons else 0.0)

    @property
    def due_at(self) -> float:
        """Time of the next look at the sensors for one who does no steps in between; inf without rules."""
        return max(self._due, self._looked_at + _NAP_MIN_S) if self._is_asked else math.inf

    def is_open(self, now: float) -> bool:
        """Whether the next step may be taken at ``now`` (seconds of a monotonic clock)."""
        if self._is_asked and not self._looked_at <= now < self._due:
            self._look(now)
        return not self.reasons

    def wait(self, on_shut: Callable[[], object] = lambda: None) -> None:
        """Return when it is open; ``on_shut`` is called first if it is not. A signal that raises ends the wait at once."""
        if self.is_open(self._clock()):
            return
        on_shut()
        while not self.is_open(now := self._clock()):
            self._sleep(max(_NAP_MIN_S, self._due - now))

    def _look(self, now: float) -> None:
        reading = self._read()
        self._warn(reading)
        found = reasons(self._rules, reading, held=self.reasons)
        self._looked_at, self._due = now, now + self._rules.period_s
        if found:
            self._shut(found, now)
        elif self.reasons and now - self._forbidden_at >= self._rules.resume_after_s:
            self._open(now)

    def _shut(self, found: dict[str, str], now: float) -> None:
        if not self.reasons:
            self._shut_at = now
            self.num_pauses += 1
        is_news = found.keys() != self.reasons.keys()
        self.reasons, self._forbidden_at = found, now
        if is_news:
            self._on_change(Pause(found, now - self._shut_at))

    def _open(self, now: float) -> None:
        seconds = now - self._shut_at
        self._paused_s += seconds
        self.reasons = {}
        self._on_change(Pause({}, seconds))

    def _warn(self, reading: Reading) -> None:
        for name, rule in self._rules.asked.items():
            is_missing = getattr(reading, name) is None
            doubt = reading.doubts.get(name, "no sensor" if is_missing else "")
            if doubt and (name, is_missing) not in self._warned:
                self._warned.add((name, is_missing))
                log.warning("rule %s: %s; %s", name, doubt, _consequence(rule, is_missing))


def open_gate(
    rules: Mapping[str, Any] | Path | str | None, *, on_change: Callable[[Pause], object] | None = None
) -> Gate:
    """Read the rules, give up the priority that they say, and set up a gate on this system's sensors.

    Args:
        rules: a TOML file or a mapping as ``rules_file.load_rules`` takes them; None for no rules.
        on_change: as :class:`Gate` has it.

    Raises:
        ConfigError: the rules are wrong, or the system does not let the process change its priority.
    """
    table = load_rules(rules)
    if table.nice:
        be_nice(table.nice)
    return Gate(table, sensors_of(table).read, on_change=on_change)


def be_nice(level: int) -> None:
    """Lower the priority of all threads of this process, and so of those to come, to ``level``; never raises it.

    Raises:
        ConfigError: the system refuses.
    """
    # Linux keeps the level by thread: libraries may have started some before.
    tasks = Path("/proc/self/task")
    threads = [int(entry.name) for entry in tasks.iterdir()] if tasks.is_dir() else [0]
    try:
        for thread in threads:
            with suppress(ProcessLookupError):
                _lower(thread, level)
    except OSError as exc:
        raise ConfigError(
            f"rules.nice = {level}: the system does not let this process have it: {exc.strerror}"
        ) from exc


def _lower(thread: int, level: int) -> None:
    if os.getpriority(os.PRIO_PROCESS, thread) < level:
        os.setpriority(os.PRIO_PROCESS, thread, level)


def _consequence(rule: Any, is_missing: bool) -> str:
    if not is_missing:
        return "the others count"
    return "no training without it" if rule.on_missing == "deny" else "the rule is left out while it is so"
