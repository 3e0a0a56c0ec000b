"""Messages received and not yet taken, by sender: each has its turn, and who sends too much loses its own first.

A sender is a topic without its last part: what one device says on ``up`` and ``status`` stays in its order.
"""

import threading
import time
from collections import OrderedDict, deque

Letter = tuple[str, bytes]


class Mailbox:
    """Filled by one thread, emptied by another."""

    def __init__(self, limit: int) -> None:
        """Hold ``limit`` messages of all senders together; a sender that is alone may fill it."""
        self._limit, self._count, self._is_woken = limit, 0, False
        self._senders: OrderedDict[str, deque[Letter]] = OrderedDict()
        """Those with messages, whose turn is next first."""
        self._changed = threading.Condition()

    def put(self, topic: str, payload: bytes) -> bool:
        """Add a message; False if one was thrown away: when all is full the newest of whoever has most waiting."""
        sender = topic.rpartition("/")[0]
        with self._changed:
            is_full = self._count >= self._limit
            if is_full and not self._make_room(sender):
                return False
            self._senders.setdefault(sender, deque()).append((topic, payload))
            self._count += 1
            self._changed.notify()
        return not is_full

    def get(self, timeout_s: float) -> Letter | None:
        """Take the next message, of each sender in turn; None after ``timeout_s`` without one, or when woken."""
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._count and not self._is_woken:
                left_s = deadline - time.monotonic()
                if left_s <= 0 or not self._changed.wait(left_s):
                    break
            self._is_woken = False
            return self._take() if self._count else None

    def wake(self) -> None:
        """End the wait for a message."""
        with self._changed:
            self._is_woken = True
            self._changed.notify()

    def _take(self) -> Letter:
        sender, letters = self._senders.popitem(last=False)
        letter = letters.popleft()
        if letters:
            self._senders[sender] = letters
        self._count -= 1
        return letter

    def _make_room(self, sender: str) -> bool:
        """Throw away the newest message of who has most, unless that is ``sender``."""
        longest = max(self._senders, key=lambda name: len(self._senders[name]))
        own = len(self._senders.get(sender, ()))
        if own >= len(self._senders[longest]):
            return False
        self._senders[longest].pop()
        self._count -= 1
        return True
