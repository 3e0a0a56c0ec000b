"""``innovation``: how a device's update differs from the one that it sent last, which both sides remember, in few bits.

Source: Sun et al., LAQ, arXiv 1909.07588 (quantiser); Zhao et al., AQUILA, arXiv 2308.00258 (level that goes by the innovation,
and laziness), both from memory. EXTRA bits beside that level, and a range for each tensor are ours.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Floats
from fleetune.device_runtime.contracts.codecs.bits import WIDTHS, packed_bits, size_of, unpacked_bits
from fleetune.device_runtime.contracts.codecs.codec import (
    BY_KIND,
    CHAIN,
    Codec,
    Decoded,
    Encoded,
    Memory,
    Shapes,
    Tensors,
    as_kind,
    chain_of,
    check_bits,
    check_no_ratio,
    check_parts,
    count_of,
    joined,
    moved,
    of_kind,
    parted,
    plus,
)
from fleetune.device_runtime.contracts.codecs.quantise import LARGEST, LEAST
from fleetune.device_runtime.errors import WireError

LAST = "innovation"
"""Kind of memory of either side: the last update by tensor, float32."""
EXTRA = 2
"""Bits beyond the level of AQUILA, at which one payload alone would tell about nothing."""
BITS_MAX = 16


_F = TypeVar("_F", np.float32, np.float64)


class _Grid(NamedTuple):
    """How each tensor is quantised."""

    sizes: NDArray[np.int64]
    ranges: Floats
    """Largest magnitude; 0 for a tensor that stays as it was."""
    levels: NDArray[np.uint8]
    """Bits of a code."""

    def spread(self, values: Floats) -> Floats:
        """One value for each tensor as one for each element."""
        return np.repeat(values, self.sizes)


def innovation(ratio: float, bits: int) -> Codec:
    """Send each tensor's innovation in ``bits`` bits, 1 to 16; 0 for the adaptive level. ConfigError for others, or a ratio."""
    check_no_ratio("innovation", ratio)
    check_bits("innovation", bits, tuple(range(1, BITS_MAX + 1)))

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        names = sorted(values)
        differences, held = moved(values, reference)
        last = _last(memory, reference, names)
        with np.errstate(over="ignore"):
            found = differences - last
        grid = _grid(found, np.array([reference[n].size for n in names], np.int64), bits)
        codes = _codes(found, grid)
        parts = {
            "values": _packed(codes, grid),
            "scales": grid.ranges.tobytes(),
            "protocol": grid.levels.tobytes(),
        }
        now = last + _steps(codes, grid)
        kept = _memory(memory, parts, now, reference, names)
        return Encoded(parts, parted(plus(held, now), reference, names), kept)

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts("innovation", parts, ("values", "scales", "protocol"))
        names = list(reference)
        grid = _read_grid(parts, np.array([reference[n].size for n in names], np.int64))
        now = _last(memory, reference, names) + _steps(_unpacked(parts.get("values", b""), grid), grid)
        kept = _memory(memory, parts, now, reference, names)
        return Decoded(parted(plus(joined(reference, names), now), reference, names), kept)

    def bound(shapes: Shapes) -> int:
        counts = [count_of(shape) for shape in shapes.values()]
        width = _width(bits) if bits else BITS_MAX
        return sum(size_of(count, width) + 6 for count in counts) + len(WIDTHS)

    kinds = (LAST, CHAIN)
    return Codec("innovation", encode, decode, bound, sender=kinds, receiver=kinds, frame=BY_KIND)


def is_lazy(step_norm2: float, error_norm2: float, model_move2: float, *, alpha: float, beta: float) -> bool:
    """Whether an update is worth no upload: what it would move and miss is less than the model itself moved.

    Args:
        step_norm2: squared L2 norm of the quantised innovation.
        error_norm2: squared L2 norm of what quantising it leaves.
        model_move2: squared L2 norm of the difference of the last two global models.
        alpha: learning rate of the model.
        beta: share of the move that may be skipped.

    Source: AQUILA, from memory.
    """
    return step_norm2 + error_norm2 <= beta / alpha**2 * model_move2


def _last(memory: Memory, reference: Tensors, names: list[str]) -> Floats:
    """The last update of these tensors, joined; zeros where there is none, or one of another shape."""
    known = of_kind(LAST, memory)
    fits = {n: known[n] for n in names if n in known and known[n].shape == reference[n].shape}
    return joined({n: np.asarray(fits.get(n, np.zeros(reference[n].shape)), "<f4") for n in names}, names)


def _memory(
    memory: Memory, parts: Mapping[str, bytes], now: Floats, reference: Tensors, names: list[str]
) -> dict[str, Array]:
    lasts = {n: np.array(value, "<f4") for n, value in parted(now, reference, names).items()}
    told = b"".join(parts.get(kind, b"") for kind in ("values", "scales", "protocol"))
    chain = sha256(chain_of(memory).encode() + "\n".join(names).encode() + b"\0" + told).digest()
    kept = {key: np.asarray(value) for key, value in memory.items() if key.startswith(f"{LAST}/")}
    return {**kept, **as_kind(LAST, lasts), f"{CHAIN}/": np.frombuffer(chain, np.uint8)}


def _grid(found: Floats, sizes: NDArray[np.int64], bits: int) -> _Grid:
    magnitudes = np.abs(found)
    ranges = _reduced(np.maximum, magnitudes, sizes)
    if not (ranges <= LARGEST).all():
        raise WireError("cannot pack: a difference beyond 2**100 does not fit innovation")
    ranges = np.where(ranges < LEAST, np.float32(0), ranges).astype("<f4")
    if bits:
        return _Grid(sizes, ranges, np.full(sizes.size, bits, np.uint8))
    norms = np.sqrt(_reduced(np.add, np.square(magnitudes, dtype=np.float64), sizes))
    told = np.divide(ranges * np.sqrt(sizes), norms, out=np.zeros_like(norms), where=ranges > 0)
    levels = np.floor(np.log2(told + 1)) + EXTRA
    return _Grid(sizes, ranges, np.clip(levels, 1, BITS_MAX).astype(np.uint8))


def _reduced(ufunc: np.ufunc, values: NDArray[_F], sizes: NDArray[np.int64]) -> NDArray[_F]:
    """Reduce each tensor's stretch of joined values; 0 for one without elements."""
    found = np.zeros(sizes.size, values.dtype)
    starts, filled = np.cumsum(sizes) - sizes, sizes > 0
    if filled.any():
        found[filled] = ufunc.reduceat(values, starts[filled])
    return found


def _codes(found: Floats, grid: _Grid) -> NDArray[np.uint16]:
    """Nearest of 2**level points from -range to range."""
    tops = _tops(grid)
    factors = np.divide(tops, 2 * grid.ranges, out=np.zeros_like(tops), where=grid.ranges > 0)
    scaled = found + grid.spread(grid.ranges)
    scaled *= grid.spread(factors)
    scaled += np.float32(0.5)
    np.minimum(scaled, np.float32(2**BITS_MAX - 1), out=scaled)
    return scaled.astype(np.uint16)


def _steps(codes: NDArray[np.uint16], grid: _Grid) -> Floats:
    steps = codes.astype(np.float32)
    steps *= grid.spread(2 * grid.ranges / _tops(grid))
    steps -= grid.spread(grid.ranges)
    return steps


def _tops(grid: _Grid) -> Floats:
    """Largest code of each tensor."""
    return np.asarray(2 ** grid.levels.astype(np.int64) - 1, np.float32)


def _width(level: int) -> int:
    return next(width for width in WIDTHS if width >= level)


def _packed(codes: NDArray[np.uint16], grid: _Grid) -> bytes:
    """Codes by their width in bytes, narrowest first, each in the least of the widths that holds its level."""
    groups: dict[int, list[NDArray[np.uint16]]] = {width: [] for width in WIDTHS}
    for (start, end), level in zip(_spans(grid), grid.levels.tolist(), strict=True):
        groups[_width(level)].append(codes[start:end])
    return b"".join(packed_bits(np.concatenate(group), width) for width, group in groups.items() if group)


def _unpacked(data: bytes, grid: _Grid) -> NDArray[np.uint16]:
    levels = grid.levels.tolist()
    counts = dict.fromkeys(WIDTHS, 0)
    for size, level in zip(grid.sizes.tolist(), levels, strict=True):
        counts[_width(level)] += size
    if len(data) != (expected := sum(size_of(count, width) for width, count in counts.items())):
        raise WireError(f"innovation: {len(data)} bytes of values, expected {expected}")
    groups, at = {}, 0
    for width, count in counts.items():
        groups[width] = unpacked_bits(data[at : at + size_of(count, width)], width, count)
        at += size_of(count, width)
    codes, taken = np.empty(int(grid.sizes.sum()), np.uint16), dict.fromkeys(WIDTHS, 0)
    for (start, end), level in zip(_spans(grid), levels, strict=True):
        width = _width(level)
        piece = groups[width][taken[width] : taken[width] + end - start]
        if width > level and (piece >> level).any():
            raise WireError("innovation: a value beyond its level")
        codes[start:end] = piece
        taken[width] += end - start
    return codes


def _spans(grid: _Grid) -> list[tuple[int, int]]:
    ends = np.cumsum(grid.sizes).tolist()
    return list(zip([0, *ends], ends, strict=False))


def _read_grid(parts: Mapping[str, bytes], sizes: NDArray[np.int64]) -> _Grid:
    """How each tensor is quantised."""
    scales, protocol = parts.get("scales", b""), parts.get("protocol", b"")
    if len(scales) != 4 * sizes.size or len(protocol) != sizes.size:
        raise WireError(f"innovation: ranges or levels are not those of {sizes.size} tensors")
    ranges = np.frombuffer(scales, "<f4")
    levels = np.frombuffer(protocol, np.uint8)
    if not ((ranges >= 0) & (ranges <= LARGEST)).all():
        raise WireError("innovation: a range is negative, not finite or beyond 2**100")
    if not ((levels >= 1) & (levels <= BITS_MAX)).all():
        raise WireError(f"innovation: a level is not from 1 to {BITS_MAX}")
    return _Grid(sizes, ranges, levels)
