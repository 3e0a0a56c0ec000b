"""How often a bad message of one sender is worth a line: some now, then their number, as a sender may send without end."""

import logging

log = logging.getLogger(__name__)

WINDOW_S = 60.0
LINES_MAX = 5
"""Of one sender in a window."""
SENDERS_MAX = 1000
"""Beyond so many in a window the others share their lines."""
_OTHERS = "others"


class Complaints:
    """What was complained of lately, by sender."""

    def __init__(self) -> None:
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
        return number <= LINES_MAX

    def _conclude(self) -> None:
        for sender, number in self._counts.items():
            if number > LINES_MAX:
                log.warning("%s: %d more messages that deserved a line", sender, number - LINES_MAX)
        self._counts.clear()
