"""The owner's record of what has left a device: one JSON object a line in the state folder, written before it is offered.

The newest part is ``left.jsonl``, the one before it ``left.1.jsonl``; older ones are gone. A line that a loss of power cut short
is passed over.
"""

from collections.abc import Iterator, Mapping
from datetime import datetime, timezone

import msgspec

from fleetune.device_runtime.files import Files
from fleetune.device_runtime.prepared import prepared

NEWEST, OLDER = "left.jsonl", "left.1.jsonl"
SIZE_MAX = 512 * 1024
"""Bytes of one part."""


class Left(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Something that was offered to an aggregator, or its verdict on that (then ``verdict`` is set, and the sizes are not)."""

    when: str
    """UTC, by the device's wall clock."""
    job: str
    round: int
    version: int = -1
    """Of the adapter that it starts from."""
    task_id: str
    digest: str = ""
    """SHA-256 of what travels; empty for an evaluation's figures."""
    kind: str = ""
    """update, class sums, or report for the figures of an evaluation."""
    samples: int = 0
    """Of the device's own behind it, each counted once."""
    steps: int = 0
    bytes: int = 0
    tensors: Mapping[str, int] = {}
    """Number by kind."""
    held_back: int = 0
    """Tensors that were trained and did not leave."""
    norm: float = 0.0
    """L2 norm of the change, before clipping."""
    scale: float = 1.0
    """What the change was multiplied by; below 1: it was clipped."""
    most_norm: float = 0.0
    """L2 norm that the change was scaled down to, as the aggregator asked; 0 for none."""
    noise: float = 0.0
    """Standard deviation of the noise in each element, in ``most_norm``; 0 for none."""
    sample_noise: float = 0.0
    """Of the steps behind it, on the sum of their samples' gradients; 0 for none."""
    epsilon: float = 0.0
    """Of one sample, spent in all rounds and jobs up to this one."""
    verdict: str = ""
    """accepted or refused."""

    @property
    def key(self) -> tuple[str, str, str]:
        """Which thing it is about."""
        return self.job, self.task_id, self.digest


class Record:
    """The lines of one device."""

    def __init__(self, files: Files) -> None:
        """Prepare; nothing is read yet."""
        self._files = files
        self._size = -1
        """Bytes of the newest part; -1 before it was looked at."""
        self._known: set[tuple[str, str, str]] = set()
        """What the newest part has lines of, verdicts aside."""
        self._is_cut = False
        """Whether its last line lacks its end."""

    def add(self, line: Left) -> None:
        """Write a line that is not there yet, synced; StateError if it cannot be written.

        A device that was killed between this and the offer makes the same thing again, and it is not written twice.
        """
        if self._size < 0:
            self._look()
        if not line.verdict and line.key in self._known:
            return
        if self._size >= SIZE_MAX:
            self._files.write(OLDER, self._files.read(NEWEST) or b"")
            self._files.delete(NEWEST)
            self._size, self._is_cut = 0, False
            self._known.clear()
        content = b"\n" * self._is_cut + msgspec.json.encode(line) + b"\n"
        size, self._size = (
            self._size + len(content),
            -1,
        )  # where it cannot be written whole it is looked at anew
        self._files.append(NEWEST, content)
        self._size, self._is_cut = size, False
        self._known.update([] if line.verdict else [line.key])

    def _look(self) -> None:
        """Read the newest part once: a device is alone in its folder."""
        content = self._files.read(NEWEST) or b""
        self._size, self._is_cut = len(content), bool(content) and not content.endswith(b"\n")
        self._known = {line.key for line in _lines(content) if not line.verdict}

    def newest(self, count: int) -> list[Left]:
        """Return the last ``count`` things that left, oldest first, each with its verdict if there is one."""
        found: dict[tuple[str, str, str], Left] = {}
        for line in (*_lines(self._files.read(OLDER) or b""), *_lines(self._files.read(NEWEST) or b"")):
            if not line.verdict:
                found[line.key] = line
            elif line.key in found:
                found[line.key] = msgspec.structs.replace(found[line.key], verdict=line.verdict)
        return [*found.values()][-count:] if count > 0 else []


def written_at(wall_s: float) -> str:
    """Return a wall clock's time as text, UTC to the second."""
    return datetime.fromtimestamp(wall_s, timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def _lines(content: bytes) -> Iterator[Left]:
    for line in content.splitlines():
        try:
            yield msgspec.json.decode(line, type=prepared(Left))
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            continue
