"""How often a bad message of one sender is worth a line: some now, then their number, as a sender may send without end."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from fleetune.device_runtime.errors import WireError, one_line

log = logging.getLogger(__name__)

WINDOW_S = 60.0
LINES_MAX = 5
"""Of one sender in a window."""
SENDERS_MAX = 1000
"""Beyond so many in a window the others share their lines."""
_OTHERS = "others"


class Complaints:
    """What was complained of lately, by sender."""

    def __init__(self, *, lines_max: int = LINES_MAX) -> None:
        """Begin; ``lines_max`` of one sender in a window."""
        self._lines_max = lines_max
        self._since = 0.0
        self._counts: dict[str, int] = {}

    def may_tell(self, sender: str, now: float) -> bool:
        """Whether one more is to be logged; the number of those that were not is, when a window is over."""
        if now - self._since >= WINDOW_S:
            self._conclude()
            self._since = now
        if sender not in self._counts and len(self._counts) >= SENDERS_MAX:
            sender = _OTHERS
        self._counts[sender] = number = self._counts.get(sender, 0) + 1
        return number <= self._lines_max

    def warn(self, sender: str, now: float, text: str, *values: object) -> None:
        """Log a warning, if one more is to be logged."""
        if self.may_tell(sender, now):
            log.warning(text, *values)

    @contextmanager
    def dropping(
        self, topic: str, sender: str, now: float, *, ours: tuple[type[Exception], ...]
    ) -> Iterator[None]:
        """Drop a message on ``topic`` that is bad, or that anything goes wrong with; ``ours``, which none brings about, pass."""
        try:
            yield
        except WireError as exc:
            self.warn(sender, now, "dropped a message on %s: %s", one_line(topic), exc)
        except ours:
            raise
        except Exception as exc:  # a fault of ours that a stranger found must not end the work of all
            if self.may_tell(sender, now):
                is_asked = log.isEnabledFor(logging.DEBUG)
                log.error("dropped a message on %s: %s", one_line(topic), fault(exc), exc_info=is_asked)

    def _conclude(self) -> None:
        for sender, number in self._counts.items():
            if number > self._lines_max:
                log.warning("%s: %d more messages that deserved a line", sender, number - self._lines_max)
        self._counts.clear()


def fault(exc: Exception) -> str:
    """Name an error that is none of ours, on one line."""
    return one_line(f"{type(exc).__name__}: {exc}")
