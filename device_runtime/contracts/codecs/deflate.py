"""Deflate in bounds: what travels shorter when entropy-coded, and nothing that inflates to more than it said.

Huffman codes alone, without a search for repetitions: of quantised values and of gaps that is shorter and several times faster
than any level of zlib (measured: docs/bytes.md).
"""

import zlib
from functools import cache
from types import ModuleType

import numpy as np

from fleetune.device_runtime.errors import WireError

HUFFMAN, RUNS, TEXT = zlib.Z_HUFFMAN_ONLY, zlib.Z_RLE, zlib.Z_DEFAULT_STRATEGY
"""Strategies: Huffman codes alone, runs of one byte too, all repetitions too."""
_RAW = -15
"""Window of a stream without header and checksum."""
_LEAST_BYTES = 64
_LEVEL = 6
_PROBE_BYTES = 8192
_ZEROS = 32
"""Of so many bytes that runs are looked for in one is zero, on average; of noise one of 256 is."""
_WORTH = 0.97
"""Of its length: what does not shrink below that is left as it is."""


@cache
def swiftest() -> ModuleType:
    """zlib-ng where it is installed, else zlib: with Huffman codes alone, or runs alone, both make the same bytes."""
    try:
        from zlib_ng import zlib_ng
    except ImportError:
        return zlib
    return zlib_ng


def deflated(content: bytes, strategy: int = HUFFMAN) -> bytes:
    """Return ``content`` entropy-coded where that is shorter, else ``content`` itself: the length tells which."""
    if len(content) < _LEAST_BYTES or not _is_worth(content, strategy):
        return content
    packed = _compressed(content, strategy)
    return packed if len(packed) < len(content) else content


def _is_worth(content: bytes, strategy: int) -> bool:
    """Whether it may become shorter: with Huffman codes alone a piece of it tells, with runs its zeros."""
    if strategy == RUNS:
        others = int(np.count_nonzero(np.frombuffer(content, np.uint8)))  # bytes.count stops at each zero
        return _ZEROS * (len(content) - others) >= len(content)
    middle = (len(content) - _PROBE_BYTES) // 2
    if strategy == TEXT or middle <= _PROBE_BYTES:
        return True
    probe = content[middle : middle + _PROBE_BYTES]
    return len(_compressed(probe, strategy)) < _WORTH * len(probe)


def inflated(data: bytes, size: int, *, what: str) -> bytes:
    """Inflate to exactly ``size`` bytes; not a byte beyond them is ever made.

    Raises:
        WireError: not one whole stream, or one of another length.
    """
    coder = swiftest()
    stream = coder.decompressobj(_RAW)
    try:
        # A byte more than expected, so never without a limit.
        content: bytes = stream.decompress(data, size + 1)
    except coder.error as exc:
        raise WireError(f"{what}: {exc}") from exc
    if len(content) != size or not stream.eof or stream.unused_data:
        raise WireError(f"{what}: does not inflate to {size} bytes and no more")
    return content


def _compressed(content: bytes, strategy: int) -> bytes:
    coder = zlib if strategy == TEXT else swiftest()
    stream = coder.compressobj(_LEVEL, zlib.DEFLATED, _RAW, 9, strategy)
    return b"".join([stream.compress(content), stream.flush()])
