"""``caesar``: the largest elements of each layer exactly, of the others signs and two scalars; stale values help to recover them.

Source: Yan et al., Caesar, arXiv 2412.19989, as a third party's code has it (sizes, scalars and the test of sign and bound).
Ours: whole layers instead of tensors, a bitmap or gaps for the places, float16 as a choice for what is exact, and that the stale
adapter is the one that the receiver started from last. The sender holds it too, so it knows to the bit what is recovered.
"""

import re
from collections.abc import Callable, Mapping
from itertools import groupby
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Floats, Indices
from fleetune.device_runtime.contracts.codecs.bits import packed_bits, size_of, unpacked_bits
from fleetune.device_runtime.contracts.codecs.codec import (
    BY_KIND,
    Codec,
    Decoded,
    Doubles,
    Encoded,
    Memory,
    Shapes,
    Tensors,
    check_bits,
    check_parts,
    check_ratio,
    count_of,
    joined,
    parted,
)
from fleetune.device_runtime.contracts.codecs.largest import largest
from fleetune.device_runtime.contracts.codecs.planes import HIGH, LOW, joined_planes, planes
from fleetune.device_runtime.contracts.codecs.positions import (
    Mask,
    packed_positions,
    position_bytes_max,
    unpacked_positions,
)
from fleetune.device_runtime.errors import WireError

SIGNS = "values-signs"
_DTYPES = {16: "<f2", 32: "<f4"}
_LAYER = re.compile(r".*?\.\d+(?=\.)")


class _Rest(NamedTuple):
    """What travels of the elements that are not exact, each (elements of the layer that are not exact,)."""

    is_negative: Mask
    mean: Floats
    largest: Floats


class _Split(NamedTuple):
    """Places of what travels exactly, and of what does not, with how many of the latter are in each layer."""

    exact: Indices
    left: Indices
    counts: Indices


_PARTS = (LOW, HIGH, "positions", SIGNS, "scales")
_NO_REST = _Rest(np.zeros(0, bool), np.zeros(0, "<f4"), np.zeros(0, "<f4"))
_Recover = Callable[[Floats, _Rest], Floats]
"""(stale values, what travels) -> values of the elements that are not exact."""


def caesar(name: str, recover: _Recover, *, has_signs: bool = True) -> Callable[[float, int], Codec]:
    """Make the codecs of one way to recover; ConfigError for a ratio not above 0 and at most 1, or bits other than 16 and 32."""

    def make(ratio: float, bits: int) -> Codec:
        check_ratio(name, ratio)
        check_bits(name, bits, tuple(_DTYPES))
        return _codec(name, ratio, bits or 32, recover, has_signs=has_signs)

    return make


def layers_of(sizes: Mapping[str, int]) -> list[int]:
    """Elements of each layer vector: tensors in the order of names whose names are equal up to their first number.

    Neighbours without a number are one layer too.
    """
    grouped = groupby(sorted(sizes), key=lambda name: found[0] if (found := _LAYER.match(name)) else "")
    return [sum(sizes[name] for name in names) for _, names in grouped]


def by_stale(stale: Floats, rest: _Rest) -> Floats:
    """The stale value where its sign and magnitude may be right, else the signed mean."""
    is_plausible = ((stale < 0) == rest.is_negative) & (np.abs(stale) <= rest.largest)
    return np.where(is_plausible, stale, by_sign(stale, rest))


def by_sign(stale: Floats, rest: _Rest) -> Floats:
    """The signed mean."""
    return np.where(rest.is_negative, -rest.mean, rest.mean)


def by_zero(stale: Floats, rest: _Rest) -> Floats:
    """Zeros."""
    return np.zeros_like(stale)


def _codec(name: str, ratio: float, bits: int, recover: _Recover, *, has_signs: bool) -> Codec:
    dtype = _DTYPES[bits]

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        names = sorted(values)
        flat, stale = joined(values, names), joined(reference, names)
        layers = layers_of({n: values[n].size for n in names})
        mask = _exact(np.abs(flat), layers, ratio)
        split = _split(mask, layers)
        exact, left = _rounded(flat[split.exact], dtype, name), flat[split.left]
        parts = {**planes(exact), "positions": packed_positions(mask)}
        if has_signs:
            parts |= {
                SIGNS: packed_bits((left < 0).view(np.uint8), 1),
                "scales": _scalars(left, split).tobytes(),
            }
        rest = _read_rest(parts, split, name) if has_signs else _NO_REST
        found = _recovered(exact, stale, split, recover(stale[split.left], rest))
        return Encoded(parts, parted(found, reference, names), {})

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts(name, parts, _PARTS if has_signs else _PARTS[:3])
        stale = joined(reference, reference)
        mask = unpacked_positions(parts.get("positions", b""), stale.size)
        split = _split(mask, layers_of({n: value.size for n, value in reference.items()}))
        exact = joined_planes(parts.get(LOW, b""), parts.get(HIGH, b""), dtype, split.exact.size)
        rest = _read_rest(parts, split, name) if has_signs else _NO_REST
        found = _recovered(exact, stale, split, recover(stale[split.left], rest))
        return Decoded(parted(found, reference, reference), {})

    def bound(shapes: Shapes) -> int:
        sizes = {n: count_of(shape) for n, shape in shapes.items()}
        count, layers = sum(sizes.values()), layers_of(sizes)
        num = min(count, len(sizes) + sum(_num_exact(ratio, size) for size in layers))
        signs = size_of(count, 1) + 8 * len(sizes) if has_signs else 0
        return bits // 8 * num + signs + position_bytes_max(count, num)

    return Codec(name, encode, decode, bound, frame=BY_KIND)


def _num_exact(ratio: float, count: int) -> int:
    return min(count, max(1, int(count * ratio)))


def _exact(magnitudes: Floats, layers: list[int], ratio: float) -> Mask:
    ends = np.cumsum(layers)[:-1]
    pieces = np.split(magnitudes, ends) if layers else []
    return np.concatenate(
        [np.zeros(0, bool), *(largest(piece, _num_exact(ratio, piece.size)) for piece in pieces)]
    )


def _split(mask: Mask, layers: list[int]) -> _Split:
    left = np.flatnonzero(~mask)
    ends = np.searchsorted(left, np.cumsum(layers, dtype=np.int64))
    return _Split(np.flatnonzero(mask), left, np.diff(ends, prepend=0))


def _rounded(exact: Floats, dtype: str, name: str) -> Array:
    with np.errstate(over="ignore"):
        found = exact.astype(dtype)
    if not np.isfinite(found).all():
        raise WireError(f"cannot pack: a value beyond 65504 does not fit {name} with 16 bits")
    return found


def _scalars(left: Floats, split: _Split) -> Floats:
    """(layers, 2): mean and largest magnitude of each layer's elements that are not exact; zeros for none."""
    found = np.zeros((split.counts.size, 2), "<f4")
    start = 0
    for row, count in zip(found, split.counts.tolist(), strict=True):
        if count:
            magnitudes = np.abs(left[start : start + count])
            top = magnitudes.max()
            row[:] = min(np.float32(magnitudes.mean(dtype=np.float64)), top), top
        start += count
    return found


def _read_rest(parts: Mapping[str, bytes], split: _Split, name: str) -> _Rest:
    signs, scales = parts.get(SIGNS, b""), parts.get("scales", b"")
    if (len(signs), len(scales)) != (size_of(split.left.size, 1), 8 * split.counts.size):
        raise WireError(
            f"{name}: signs or scalars are not those of {split.left.size} elements in {split.counts.size} layers"
        )
    scalars = np.frombuffer(scales, "<f4").reshape(-1, 2)
    if not ((scalars[:, 0] >= 0) & (scalars[:, 0] <= scalars[:, 1]) & np.isfinite(scalars[:, 1])).all():
        raise WireError(f"{name}: a mean is negative, above its maximum or not finite")
    mean, top = (np.repeat(column, split.counts) for column in scalars.T)
    return _Rest(unpacked_bits(signs, 1, split.left.size).view(np.bool_), mean, top)


def _recovered(exact: Array, stale: Floats, split: _Split, left: Floats) -> Doubles:
    found = np.empty(stale.size, np.float64)
    found[split.exact] = exact
    found[split.left] = left
    return found
