"""Deflate in bounds: what travels shorter when entropy-coded, and nothing that inflates to more than it said.

Huffman codes alone, without a search for repetitions: of quantised values and of gaps that is shorter and several times faster
than any level of zlib (measured: docs/bytes.md).
"""

import zlib
from functools import cache
from types import ModuleType

from fleetune.device_runtime.errors import WireError

RAW = -15
"""Window of a stream without header and checksum."""
_LEAST_BYTES = 64
_LEVEL = 6
_PROBE_BYTES = 8192
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


def deflated(content: bytes, *, is_text: bool = False) -> bytes:
    """Return ``content`` entropy-coded where that is shorter, else ``content`` itself: the length tells which.

    In a text, repetitions are searched for too.
    """
    strategy = zlib.Z_DEFAULT_STRATEGY if is_text else zlib.Z_HUFFMAN_ONLY
    if len(content) < _LEAST_BYTES:
        return content
    middle = (len(content) - _PROBE_BYTES) // 2
    if middle > _PROBE_BYTES and not _is_worth(content[middle : middle + _PROBE_BYTES], strategy):
        return content
    packed = _compressed(content, strategy)
    return packed if len(packed) < len(content) else content


def inflated(data: bytes, size: int, *, what: str, window: int = RAW) -> bytes:
    """Inflate to exactly ``size`` bytes; not a byte beyond them is ever made.

    Raises:
        WireError: not one whole stream, or one of another length.
    """
    coder = swiftest()
    stream = coder.decompressobj(window)
    try:
        # A byte more than expected, so never without a limit.
        content: bytes = stream.decompress(data, size + 1)
    except coder.error as exc:
        raise WireError(f"{what}: {exc}") from exc
    if len(content) != size or not stream.eof or stream.unused_data:
        raise WireError(f"{what}: does not inflate to {size} bytes and no more")
    return content


def _is_worth(piece: bytes, strategy: int) -> bool:
    return len(_compressed(piece, strategy)) < _WORTH * len(piece)


def _compressed(content: bytes, strategy: int) -> bytes:
    coder = zlib if strategy == zlib.Z_DEFAULT_STRATEGY else swiftest()
    stream = coder.compressobj(_LEVEL, zlib.DEFLATED, RAW, 9, strategy)
    return b"".join([stream.compress(content), stream.flush()])
