"""What happens to a device that a person may want to see."""

from collections.abc import Mapping
from typing import NamedTuple


class Event(NamedTuple):
    """Something that a person may want to see.

    ``kind`` is offer, step, paused, resumed, trained, evaluated, accepted, refused, declined or finished; the rest
    depends on it.
    """

    kind: str
    round: int
    values: Mapping[str, float] = {}
    text: str = ""

    def __str__(self) -> str:
        values = ", ".join(f"{name.replace('_', ' ')} {_shown(value)}" for name, value in self.values.items())
        kind = "" if self.kind in self.values else self.kind  # "step 12, ..." says that it is a step
        return f"round {self.round}: " + ": ".join(filter(None, (kind, values, self.text)))


def _shown(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4g}"
