"""Transfers: content in chunks, pulled by bitmap, so that it survives any loss and resumes after any reconnection.

Neither side knows a socket or a clock: whoever calls passes chunks, requests and the time.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator

from fleetune.device_runtime.contracts.fields import CHUNK_BYTES, TRANSFER_BYTES_MAX
from fleetune.device_runtime.contracts.wire import Chunk, Request, TransferManifest
from fleetune.device_runtime.errors import TransportError, WireError

DIGEST_BYTES = 8
NUM_CHUNKS_MAX = 8192
"""Chunks of one transfer: their digests take at most 64 KiB of the message that announces it."""
REQUEST_CHUNKS_MAX = 32
"""Chunks served at once, whatever a request says."""
CHUNK_BYTES_MIN = CHUNK_BYTES // 32
"""Chunks become no smaller than this, however often a connection breaks."""

_SHA256 = re.compile(r"[0-9a-f]{64}")


class Outgoing:
    """Content that others pull; ``manifest`` announces it."""

    def __init__(self, content: bytes, *, chunk_bytes: int = CHUNK_BYTES) -> None:
        """Hash ``content``; it is kept, not copied.

        Raises:
            TransportError: more than ``NUM_CHUNKS_MAX`` chunks of this size.
        """
        count = _num_chunks(len(content), chunk_bytes)
        if count > NUM_CHUNKS_MAX:
            raise TransportError(
                f"{len(content)} bytes are {count} chunks of {chunk_bytes}; at most {NUM_CHUNKS_MAX} are sent: "
                "raise the MQTT server's packet limit"
            )
        self._content = content
        self.manifest = TransferManifest(
            size_bytes=len(content),
            chunk_bytes=chunk_bytes,
            chunk_digests=b"".join(_digest(self._piece(i, chunk_bytes)) for i in range(count)),
            sha256=hashlib.sha256(content).hexdigest(),
        )

    def is_of(self, request: Request) -> bool:
        """Whether a request is for as many chunks as there are: they may have become smaller since."""
        return len(request.missing) == _bitmap_bytes(len(self.manifest.chunk_digests) // DIGEST_BYTES)

    def chunks(self, request: Request) -> Iterator[Chunk]:
        """Yield the chunks asked for, lowest first, at most ``request.limit`` and ``REQUEST_CHUNKS_MAX``.

        Raises:
            WireError: a request for another transfer, or with a bitmap of another length; at once, not when iterated.
        """
        manifest = self.manifest
        count = len(manifest.chunk_digests) // DIGEST_BYTES
        if request.sha256 != manifest.sha256:
            raise WireError(f"request for transfer {request.sha256[:64]!r}; this is {manifest.sha256}")
        if len(request.missing) != _bitmap_bytes(count):
            raise WireError(f"bitmap of {len(request.missing)} bytes for {count} chunks")
        wanted = [i for i in range(count) if request.missing[i // 8] >> i % 8 & 1]
        return (self._chunk(i) for i in wanted[: max(0, min(request.limit, REQUEST_CHUNKS_MAX))])

    def _chunk(self, index: int) -> Chunk:
        manifest = self.manifest
        return Chunk(sha256=manifest.sha256, index=index, data=self._piece(index, manifest.chunk_bytes))

    def _piece(self, index: int, chunk_bytes: int) -> bytes:
        return self._content[index * chunk_bytes : (index + 1) * chunk_bytes]


class Incoming:
    """What has arrived of a transfer; memory grows with what arrives, not with what is announced."""

    def __init__(self, manifest: TransferManifest, *, size_bytes_max: int) -> None:
        """Refuse before anything is allocated.

        Args:
            manifest: as announced by the sender.
            size_bytes_max: largest size that this content can have.

        Raises:
            WireError: larger than that, or inconsistent in itself (all problems listed).
        """
        problems = [*_problems(manifest, min(size_bytes_max, TRANSFER_BYTES_MAX))]
        if problems:
            raise WireError("transfer refused: " + "; ".join(problems))
        self.manifest = manifest
        self._pieces: dict[int, bytes | memoryview] = {}
        self._first = 0
        """No chunk before it is missing."""
        self._num_chunks = _num_chunks(manifest.size_bytes, manifest.chunk_bytes)
        self._is_verified = self._is_wary = False
        """Whether the whole is what its SHA-256 says; and whether it was not once, so that each chunk is looked at."""

    @property
    def done(self) -> bool:
        """Whether every chunk is here."""
        return len(self._pieces) == self._num_chunks

    @property
    def share(self) -> float:
        """Share of the chunks that is here."""
        return len(self._pieces) / self._num_chunks if self._num_chunks else 1.0

    def add(self, chunk: Chunk) -> bool:
        """Store a chunk; False if it was here already. Whether it is damaged is known once all are here (:meth:`verify`).

        Raises:
            WireError: of another transfer, or a wrong index or size; or a wrong digest, once any had one. Nothing is stored.
        """
        manifest, index = self.manifest, chunk.index
        if chunk.sha256 != manifest.sha256:
            raise WireError(f"chunk of transfer {chunk.sha256[:64]!r}; expected {manifest.sha256}")
        if not 0 <= index < self._num_chunks:
            raise WireError(f"chunk {index} of {self._num_chunks}")
        size = min(manifest.chunk_bytes, manifest.size_bytes - index * manifest.chunk_bytes)
        if len(chunk.data) != size:
            raise WireError(f"chunk {index}: {len(chunk.data)} bytes, expected {size}")
        if index in self._pieces:
            return False
        if self._is_wary and not self._is_right(index, chunk.data):
            raise WireError(f"chunk {index}: its digest differs")
        self._pieces[index] = chunk.data
        return True

    def verify(self) -> None:
        """Once every chunk is here, see whether the whole is what its SHA-256 says.

        One digest of all is taken, not one of each chunk and one of all. If it differs, chunks that are damaged are forgotten,
        and from then on each is looked at as it comes: who slips one in delays a transfer once.

        Raises:
            WireError: chunks were damaged.
        """
        if self._is_verified or not self.done:
            return
        whole = hashlib.sha256()
        for index in range(self._num_chunks):
            whole.update(self._pieces[index])
        self._is_verified = whole.hexdigest() == self.manifest.sha256
        if self._is_verified or self._is_wary:
            return
        self._is_wary = True
        damaged = [index for index, piece in self._pieces.items() if not self._is_right(index, piece)]
        for index in damaged:
            del self._pieces[index]
        self._first = 0
        if damaged:
            named = ", ".join(map(str, sorted(damaged)[:8]))
            raise WireError(f"chunk {named}: its digest differs")

    def take_over(self, other: "Incoming") -> None:
        """Take what has come of the same content in chunks of another size, as far as it makes whole chunks."""
        if other.manifest.sha256 != self.manifest.sha256:
            return
        own, step = self.manifest.chunk_bytes, other.manifest.chunk_bytes
        for index in range(self._num_chunks):
            start, end = index * own, min((index + 1) * own, self.manifest.size_bytes)
            pieces = [other._pieces.get(i, b"") for i in range(start // step, -(-end // step))]
            data = b"".join(pieces)[start % step :][: end - start]
            if all(pieces) and self._is_right(index, data):
                self._pieces[index] = data

    def missing(self) -> Iterator[int]:
        """Yield the indices of the chunks that are not here yet, lowest first; what has come in order costs nothing."""
        while self._first in self._pieces:
            self._first += 1
        return (i for i in range(self._first, self._num_chunks) if i not in self._pieces)

    def request(self, *, limit: int = 16) -> Request | None:
        """Ask for up to ``limit`` of the missing chunks; None if none is missing."""
        return self.request_of(self.missing(), limit=limit)

    def request_of(self, indices: Iterable[int], *, limit: int = 16, shared: str = "") -> Request | None:
        """Ask for up to ``limit`` of the chunks ``indices``, in a stream or alone; None if there are none."""
        bitmap = bytearray(_bitmap_bytes(self._num_chunks))
        for index in indices:
            bitmap[index // 8] |= 1 << index % 8
        if not any(bitmap):
            return None
        return Request(sha256=self.manifest.sha256, missing=bytes(bitmap), limit=limit, shared=shared)

    def content(self) -> bytes:
        """Return the whole.

        Raises:
            WireError: chunks are missing, or the whole is not what its SHA-256 says; then every chunk is forgotten.
        """
        if not self.done:
            raise WireError(f"{len([*self.missing()])} of {self._num_chunks} chunks are missing")
        self.verify()
        if not self._is_verified:
            self._pieces.clear()
            self._first = 0
            raise WireError(f"transfer {self.manifest.sha256}: SHA-256 of the whole differs")
        content = b"".join(self._pieces[i] for i in range(self._num_chunks))
        whole, size = memoryview(content), self.manifest.chunk_bytes
        for index in range(self._num_chunks):  # both would take the memory of two
            self._pieces[index] = whole[index * size : (index + 1) * size]
        return content

    def _is_right(self, index: int, piece: bytes | memoryview) -> bool:
        return _digest(piece) == self.manifest.chunk_digests[index * DIGEST_BYTES :][:DIGEST_BYTES]


def _problems(manifest: TransferManifest, size_bytes_max: int) -> Iterator[str]:
    if not 0 <= manifest.size_bytes <= size_bytes_max:
        yield f"{manifest.size_bytes} bytes; expected 0 to {size_bytes_max}"
    if not _SHA256.fullmatch(manifest.sha256):
        yield "its sha256 is not 64 hexadecimal digits"
    if not 1 <= manifest.chunk_bytes <= CHUNK_BYTES:
        yield f"chunks of {manifest.chunk_bytes} bytes; expected 1 to {CHUNK_BYTES}"
        return
    count = _num_chunks(manifest.size_bytes, manifest.chunk_bytes)
    if count > NUM_CHUNKS_MAX:
        yield f"{count} chunks; at most {NUM_CHUNKS_MAX} are taken"
    if len(manifest.chunk_digests) != DIGEST_BYTES * count:
        yield f"{len(manifest.chunk_digests)} bytes of digests for {count} chunks"


def _num_chunks(size_bytes: int, chunk_bytes: int) -> int:
    return -(-size_bytes // chunk_bytes)


def _bitmap_bytes(num_chunks: int) -> int:
    return (num_chunks + 7) // 8


def _digest(piece: bytes | memoryview) -> bytes:
    return hashlib.sha256(piece).digest()[:DIGEST_BYTES]
