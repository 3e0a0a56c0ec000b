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

    def claim(self, job: str, artifact: str) -> None:
        """Work for this job with this artifact (SHA-256 of its manifest) from now on.

        What was kept of the job with another artifact is set aside, and is there again when that one is claimed. What an
        earlier release kept, which names no artifact, is this one's.
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


def artifact_key(job: str) -> str:
    """Fact that says which artifact a job's entries and facts are of."""
    return f"artifact/{job}"


def aside(job: str, artifact: str) -> str:
    """Job under which is kept what is set aside; no job can have that name."""
    return f"{job}@{artifact}"


def renamed(key: str, old: str, new: str) -> str:
    """Key of a fact of job ``old`` as one of job ``new``; other facts keep their key."""
    for kind in ("made", "session"):
        if f"{key}/".startswith(f"{kind}/{old}/"):
            return f"{kind}/{new}{key[len(f'{kind}/{old}') :]}"
    return key


class MemoryOutbox:
    """An outbox in memory, for a simulation: gone with the object, and no file descriptor."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Entry] = {}
        self._facts: dict[str, bytes] = {}

    def claim(self, job: str, artifact: str) -> None:
        """Set aside what is of another artifact, and bring back what is of this one."""
        kept = self._facts.get(artifact_key(job), artifact.encode()).decode()
        if kept != artifact:
            self._rename(job, aside(job, kept))
            self._rename(aside(job, artifact), job)
        self._facts[artifact_key(job)] = artifact.encode()

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

    def _rename(self, old: str, new: str) -> None:
        self._facts = {renamed(key, old, new): value for key, value in self._facts.items()}
        entries = (e._replace(job=new) if e.job == old else e for e in self._entries.values())
        self._entries = {(e.job, e.task_id, e.digest): e for e in entries}
