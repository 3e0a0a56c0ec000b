"""Which of many elements travel, in the form that is shortest: a bitmap, or the gaps between those that are fewer.

A gap is the number of elements passed over, as a byte below 255; each 255 before it adds 255. Entropy-coded by the frame, gaps
of places drawn at random take about as many bits as there is information in them, at any density.
"""

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.codecs.bits import packed_bits, size_of, unpacked_bits
from fleetune.device_runtime.errors import WireError

Mask = NDArray[np.bool_]
_BITMAP, _TAKEN, _LEFT = b"\0", b"\1", b"\2"
"""First byte: a bitmap, lowest bit first; gaps between those that travel; gaps between those that do not."""
_FEW = 0.3
"""Share of the elements above which gaps save less than an eighth of a bitmap, and take far longer."""
_RARE, _OFTEN = 0.03, 0.1
"""Shares between which numpy is three times slower at finding what is true."""
_CODED = 256
"""Gaps that are enough to be entropy-coded."""
_MORE = 255


def packed_positions(mask: Mask) -> bytes:
    """Pack which elements travel."""
    num = np.count_nonzero(mask)
    if min(num, mask.size - num) <= _FEW * mask.size:
        form, rarer = (_TAKEN, mask) if 2 * num <= mask.size else (_LEFT, ~mask)
        gaps = _gaps(places_of(rarer))
        if gaps.size >= _CODED or gaps.size <= size_of(mask.size, 1):
            return form + gaps.tobytes()
    return _BITMAP + packed_bits(mask.view(np.uint8), 1)


def unpacked_positions(part: bytes, count: int) -> Mask:
    """Unpack which of ``count`` elements travel; WireError if ``part`` does not say."""
    form, body = part[:1], np.frombuffer(part, np.uint8, offset=min(1, len(part)))
    if form == _BITMAP and body.size == size_of(count, 1) and not _overhang(body, count):
        return unpacked_bits(body.tobytes(), 1, count).view(np.bool_)
    at = _places(body) if form in (_TAKEN, _LEFT) else None
    if at is None or (at.size and at[-1] >= count):
        raise WireError(f"{len(part)} bytes of positions do not say which of {count} elements travel")
    mask = np.full(count, form == _LEFT)
    mask[at] = form == _TAKEN
    return mask


def places_of(mask: Mask) -> Indices:
    """Places of the elements that travel, ascending."""
    if not _RARE * mask.size < np.count_nonzero(mask) <= _OFTEN * mask.size:
        return np.flatnonzero(mask)
    # Up to a tenth numpy takes a branch for each, beyond it none: more are asked for, and dropped.
    more = mask.size // 9 + 1
    return np.flatnonzero(np.concatenate([mask, np.ones(more, bool)]))[:-more]


def position_bytes_max(count: int, travelling: int) -> int:
    """Length that the positions of at most so many elements never exceed, before they are entropy-coded."""
    listed = min(travelling, int(_FEW * count) + 1)
    return 2 + max(size_of(count, 1), listed + count // _MORE)


def _gaps(at: Indices) -> NDArray[np.uint8]:
    passed = at.copy()
    passed[1:] -= at[:-1] + 1
    if passed.max(initial=0) < _MORE:
        return passed.astype(np.uint8)
    more, last = np.divmod(passed, _MORE)
    ends = np.cumsum(more + 1) - 1
    gaps = np.full(int(ends[-1]) + 1, _MORE, np.uint8)
    gaps[ends] = last
    return gaps


def _places(gaps: NDArray[np.uint8]) -> Indices | None:
    """Places of these gaps; None if the last one has no end."""
    if gaps.size and gaps[-1] == _MORE:
        return None
    is_end, places = gaps < _MORE, gaps.astype(np.int64)
    places += is_end
    np.cumsum(places, out=places)
    places -= 1
    return places[is_end]


def _overhang(body: NDArray[np.uint8], count: int) -> bool:
    """Whether a bitmap names elements beyond the last."""
    return bool(count % 8) and bool(body[-1] >> (count % 8))
