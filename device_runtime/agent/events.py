"""What happens to a device that a person may want to see."""

from collections.abc import Mapping
from typing import NamedTuple

NO_ROUND = -1


class Event(NamedTuple):
    """Something that a person may want to see.

    ``kind`` is connected, data, aggregator, offer, restored, step, paused, resumed, trained, summed, evaluated, accepted,
    refused, declined or finished; the rest depends on it, and ``round`` is ``NO_ROUND`` for what belongs to none.
    """

    kind: str
    round: int
    values: Mapping[str, float] = {}
    text: str = ""

    def __str__(self) -> str:
        values = ", ".join(_named(name, value) for name, value in self.values.items())
        kind = "" if self.kind in self.values else self.kind  # "step 12, ..." says that it is a step
        of = "" if self.round == NO_ROUND else f"round {self.round}"
        return ": ".join(filter(None, (of, kind, values, self.text)))


def _named(name: str, value: float) -> str:
    if name == "size_bytes":
        return f"size {value / 1e3:.1f} kB"
    return f"{name.replace('_', ' ')} {_shown(value)}"


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
