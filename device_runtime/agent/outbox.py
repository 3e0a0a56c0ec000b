"""What a device owes and what it remembers between starts."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol


class Entry(NamedTuple):
    """One thing to deliver, known by (job, task_id, digest)."""

    job: str
    task_id: str
    """Of an entry made by 0.1.0 ``round-`` and the number of its round."""
    digest: str
    header: bytes
    """An encoded ``wire.UpdateReady`` or ``wire.Report``."""
    payload: bytes
    """What the header announces; empty for a report."""


class Outbox(Protocol):
    """Entries until they are acknowledged, and small facts; a change is kept for good when its method returns.

    Every method raises StateError if what it needs cannot be read or written; then nothing is changed.
    """

    def put(self, entry: Entry, *, facts: Mapping[str, bytes] | None = None) -> None:
        """Add an entry, and remember ``facts``, both or neither; an entry that is there already stays."""

    def pending(self) -> list[Entry]:
        """Return the entries not acknowledged, in the order in which they were put."""

    def acknowledge(self, job: str, task_id: str, digest: str) -> bool:
        """Forget an entry; False if there is none."""

    def remember(self, key: str, value: bytes) -> None:
        """Keep a small fact, such as the device's id; replaces what was there."""

    def recall(self, key: str) -> bytes | None:
        """Return the fact, or None."""

    def forget(self, key: str) -> None:
        """Drop a fact, if it is there."""


class MemoryOutbox:
    """An outbox in memory, for a simulation: gone with the object, and no file descriptor."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self._facts: dict[str, bytes] = {}

    def put(self, entry: Entry, *, facts: Mapping[str, bytes] | None = None) -> None:
        """Add an entry, and remember ``facts``; an entry that is there already stays."""
        self._facts.update(facts or {})
        self._entries.setdefault((entry.job, entry.task_id, entry.digest), entry)

    def pending(self) -> list[Entry]:
        """Return the entries not acknowledged, in the order in which they were put."""
        return list(self._entries.values())

    def acknowledge(self, job: str, task_id: str, digest: str) -> bool:
        """Forget an entry; False if there is none."""
        return self._entries.pop((job, task_id, digest), None) is not None

    def remember(self, key: str, value: bytes) -> None:
        """Keep a small fact; replaces what was there."""
        self._facts[key] = value

    def recall(self, key: str) -> bytes | None:
        """Return the fact, or None."""
        return self._facts.get(key)

    def forget(self, key: str) -> None:
        """Drop a fact, if it is there."""
        self._facts.pop(key, None)
