"""``xor``: to the bit; what differs from the reference in the bits of float32, by bytes of equal rank, deflated.

The lowest ranks are as good as noise where an element changed at all. They are stored as they are, up to the first rank with
zeros in it. Runs alone are looked for, of the zeros where nothing changed.
"""

import zlib
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.contracts.codecs.codec import tensorwise
from fleetune.device_runtime.contracts.codecs.deflate import RAW, inflated, swiftest

_HEADER = b"\x78\x01"
_STORED_MAX = 2**16 - 1
"""Bytes of a stored block."""
_ZEROS = 32
"""Of so many bytes of a rank that is worth deflating one is zero, on average; of noise one of 256 is."""


def _encode(value: Floats, reference: Floats) -> tuple[bytes, Floats]:
    changed = value.reshape(-1).view("<u4") ^ reference.reshape(-1).view("<u4")
    ranks = np.empty((4, changed.size), np.uint8)  # bytes of equal rank
    for rank in ranks:  # Shifted: a transposed copy takes twice as long.
        np.copyto(rank, changed, casting="unsafe")
        changed >>= 8
    noisy = next((rank for rank in range(4) if _is_worth(ranks[rank])), 4)
    blocks = [*chain.from_iterable(map(_stored, ranks[:noisy])), *_deflated(ranks[noisy:])]
    checksum = swiftest().adler32(ranks.data).to_bytes(4, "big")
    return b"".join([_HEADER, *blocks, checksum]), value


def _decode(part: bytes, reference: Floats) -> Floats:
    content = inflated(part, 4 * reference.size, what="xor", window=zlib.MAX_WBITS)
    bits = np.empty(reference.size, "<u4")
    # Rank by rank: a transposed copy writes four bytes at a time, and takes twice as long.
    for rank, written in zip(np.frombuffer(content, np.uint8).reshape(4, -1), _bytes_of(bits).T, strict=True):
        written[:] = rank
    bits ^= reference.reshape(-1).view("<u4")
    return np.asarray(bits.view("<f4").reshape(reference.shape))


def _bytes_of(words: NDArray[np.uint32]) -> NDArray[np.uint8]:
    """View (elements, 4), the lowest rank first."""
    return words.view(np.uint8).reshape(-1, 4)


def _is_worth(rank: NDArray[np.uint8]) -> bool:
    return _ZEROS * (rank.size - int(np.count_nonzero(rank))) >= rank.size


def _stored(rank: NDArray[np.uint8]) -> list[bytes | memoryview]:
    """Blocks of a deflate stream, none of them the last, that end on a byte: RFC 1951, section 3.2.4."""
    found, content = list[bytes | memoryview](), rank.data
    for start in range(0, len(content), _STORED_MAX):
        piece = content[start : start + _STORED_MAX]
        size = len(piece)
        found += [b"\0", size.to_bytes(2, "little"), (size ^ _STORED_MAX).to_bytes(2, "little"), piece]
    return found


def _deflated(ranks: NDArray[np.uint8]) -> list[bytes]:
    """The last blocks, with codes of its own for each rank."""
    stream = swiftest().compressobj(1, zlib.DEFLATED, RAW, 9, zlib.Z_RLE)
    found = []
    for rank in ranks[:-1]:
        found += [stream.compress(rank), stream.flush(zlib.Z_SYNC_FLUSH)]
    return [*found, *map(stream.compress, ranks[-1:]), stream.flush()]


def _size_bytes_max(count: int) -> int:
    size = 4 * count
    return size + (size >> 12) + (size >> 14) + (size >> 25) + 64  # zlib's compressBound, and some more


xor = tensorwise("xor", encode=_encode, decode=_decode, size_bytes_max=_size_bytes_max)
