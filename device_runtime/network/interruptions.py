"""What interruptions of a connection tell: that the server is away, or that somebody else holds this side's client id."""

from math import inf

SHORT_S = 15.0
SMALL_BYTES = 20_000
"""A connection that moved more is hardly worth a word: links that cut after so much move on with every one."""
AWAY_S = 5.0
LOOK_S, LOOK_MAX_S = 3.0, 20.0


class Outage:
    """How long there has been no connection, and when to say so: after 5 s, 50 s, 500 s."""

    def __init__(self) -> None:
        self._since: float | None = None
        self._tell_at = inf

    def lasts(self, now: float) -> float:
        """There is no connection; seconds of that if it is time to say so, else 0."""
        if self._since is None:
            self._since, self._tell_at = now, now + AWAY_S
        if now < self._tell_at:
            return 0.0
        lasted_s = now - self._since
        self._tell_at = self._since + 10 * max(lasted_s, AWAY_S)
        return lasted_s

    def ends(self, now: float) -> float:
        """There is a connection; seconds that there was none, if that was said, else 0."""
        since, self._since = self._since, None
        if since is None or self._tell_at <= since + AWAY_S:
            return 0.0
        return now - since


class Evictions:
    """Connections in a row that the server ended soon, with little done: what another client with the same id does to one.

    A server that ends them for other reasons looks the same from here, so that somebody has to look for the other client.
    """

    def __init__(self) -> None:
        self.num_in_row = 0
        """Those on which little was done; what a person may want to hear of."""
        self._num_busy = 0

    def look_s(self, *, lasted_s: float, moved_bytes: int, is_told: bool) -> float:
        """A connection was ended by the other side; seconds to look now for another holder of the id, mostly 0.

        Args:
            lasted_s: how long it stood.
            moved_bytes: what arrived on it, either way.
            is_told: whether the server said that another client took over.
        """
        if not is_told and lasted_s >= SHORT_S:
            self.num_in_row = self._num_busy = 0
            return 0.0
        if not is_told and moved_bytes >= SMALL_BYTES:
            # Two devices of a lively job move as much before each throws the other off.
            self.num_in_row, self._num_busy = 0, self._num_busy + 1
            return LOOK_S if self._num_busy > 1 and _is_power_of_two(self._num_busy) else 0.0
        self.num_in_row += 1
        is_due = _is_power_of_two(self.num_in_row) and (is_told or self.num_in_row > 1)
        return min(max(LOOK_S, 1.5 * self.num_in_row), LOOK_MAX_S) if is_due else 0.0


def _is_power_of_two(number: int) -> bool:
    return number & (number - 1) == 0
