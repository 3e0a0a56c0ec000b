"""Messages received and not yet taken, by sender: each has its turn, and who sends too much loses its own first.

A sender is a topic without its last part: what one device says on ``up`` and ``status`` stays in its order.
"""

import threading
import time
from collections import OrderedDict, deque

Letter = tuple[str, bytes]
QUEUED_BYTES = 64 * 1024 * 1024


class Mailbox:
    """Filled by one thread, emptied by another."""

    def __init__(self, limit: int, *, limit_bytes: int = QUEUED_BYTES) -> None:
        """Hold ``limit`` messages and ``limit_bytes`` of all senders together; a sender that is alone may fill it."""
        self.dropped = 0
        """Messages thrown away."""
        self._limit, self._limit_bytes, self._is_woken = limit, limit_bytes, False
        self._count = self._size_bytes = 0
        self._senders: OrderedDict[str, deque[Letter]] = OrderedDict()
        """Those with messages, whose turn is next first."""
        self._by_number: dict[int, dict[str, None]] = {}
        """Senders by how many messages of theirs wait; whom to throw away of is found without a look at each."""
        self._most = 0
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return self._count

    def has_of(self, topic: str) -> bool:
        """Whether a message of the sender of a topic waits."""
        return topic.rpartition("/")[0] in self._senders

    def put(self, topic: str, payload: bytes) -> bool:
        """Add a message; False if any was thrown away: when all is full the newest of whoever has most waiting."""
        sender = topic.rpartition("/")[0]
        with self._changed:
            before = self.dropped
            while self._is_full_for(payload) and self._make_room(sender):
                pass
            if self._is_full_for(payload):
                self.dropped += 1
            else:
                letters = self._senders.setdefault(sender, deque())
                letters.append((topic, payload))
                self._moved(sender, len(letters) - 1, len(letters))
                self._add(1, len(payload))
                self._changed.notify()
            return self.dropped == before

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
        self._moved(sender, len(letters) + 1, len(letters))
        self._add(-1, -len(letter[1]))
        return letter

    def _add(self, count: int, size_bytes: int) -> None:
        self._count += count
        self._size_bytes += size_bytes

    def _is_full_for(self, payload: bytes) -> bool:
        return self._count >= self._limit or self._size_bytes + len(payload) > self._limit_bytes

    def _moved(self, sender: str, before: int, now: int) -> None:
        """Note how many messages of a sender wait now, one more or one fewer."""
        if before:
            del self._by_number[before][sender]
        if now:
            self._by_number.setdefault(now, {})[sender] = None
        if before and not self._by_number[before]:
            del self._by_number[before]
        if now > self._most or self._most not in self._by_number:
            self._most = now  # it was alone at the top, and is now one above or below

    def _make_room(self, sender: str) -> bool:
        """Throw away the newest message of who has most, unless that is ``sender``."""
        own = len(self._senders.get(sender, ()))
        if own >= self._most:
            return False
        longest = next(iter(self._by_number[self._most]))
        letters = self._senders[longest]
        _, thrown = letters.pop()
        if not letters:
            del self._senders[longest]
        self._moved(longest, len(letters) + 1, len(letters))
        self._add(-1, -len(thrown))
        self.dropped += 1
        return True
