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

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.contracts.codecs.bits import packed_bits, size_of, unpacked_bits
from fleetune.device_runtime.contracts.codecs.codec import (
    BY_KIND,
    Codec,
    Decoded,
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
        exact, left = _rounded(flat[mask], dtype, name), ~mask
        scalars = _scalars(np.abs(flat), left, layers) if has_signs else np.zeros((0, 2), "<f4")
        parts = {**planes(exact), "positions": packed_positions(mask), "scales": scalars.tobytes()}
        if has_signs:
            parts[SIGNS] = packed_bits((flat[left] < 0).view(np.uint8), 1)
        found = _recovered(exact, stale, mask, _rest(parts, scalars, left, layers, has_signs), recover)
        return Encoded(parts, parted(found, reference, names), {})

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts(name, parts, (LOW, HIGH, SIGNS, "positions", "scales"))
        stale = joined(reference, reference)
        layers = layers_of({n: value.size for n, value in reference.items()})
        mask = unpacked_positions(parts.get("positions", b""), stale.size)
        num = int(np.count_nonzero(mask))
        exact = joined_planes(parts.get(LOW, b""), parts.get(HIGH, b""), dtype, num)
        scalars = _read_scalars(parts, len(layers) if has_signs else 0, name)
        if len(parts.get(SIGNS, b"")) != (size_of(stale.size - num, 1) if has_signs else 0):
            raise WireError(f"{name}: signs are not those of {stale.size - num} elements")
        rest = _rest(parts, scalars, ~mask, layers, has_signs)
        return Decoded(parted(_recovered(exact, stale, mask, rest, recover), reference, reference), {})

    def bound(shapes: Shapes) -> int:
        sizes = {n: count_of(shape) for n, shape in shapes.items()}
        count, layers = sum(sizes.values()), layers_of(sizes)
        num = sum(_num_exact(ratio, size) for size in layers)
        signs = size_of(count, 1) + 8 * len(layers) if has_signs else 0
        return bits // 8 * num + signs + position_bytes_max(count, num)

    return Codec(name, encode, decode, bound, frame=BY_KIND)


def _num_exact(ratio: float, count: int) -> int:
    return min(count, max(1, int(count * ratio)))


def _exact(magnitudes: Floats, layers: list[int], ratio: float) -> Mask:
    pieces = [largest(piece, _num_exact(ratio, piece.size)) for piece in _pieces(magnitudes, layers)]
    return np.concatenate([np.zeros(0, bool), *pieces])


def _pieces(flat: Floats, layers: list[int]) -> list[Floats]:
    return np.split(flat, np.cumsum(layers)[:-1]) if layers else []


def _rounded(exact: Floats, dtype: str, name: str) -> Floats:
    with np.errstate(over="ignore"):
        found = exact.astype(dtype)
    if not np.isfinite(found).all():
        raise WireError(f"cannot pack: a value beyond 65504 does not fit {name} with 16 bits")
    return found


def _scalars(magnitudes: Floats, left: Mask, layers: list[int]) -> Floats:
    """(layers, 2): mean and largest magnitude of each layer's elements that are not exact."""
    rows = [
        _two(piece[here])
        for piece, here in zip(_pieces(magnitudes, layers), _pieces(left, layers), strict=True)
    ]
    return np.array(rows, "<f4").reshape(-1, 2)


def _two(magnitudes: Floats) -> tuple[np.float32, np.float32]:
    if not magnitudes.size:
        return np.float32(0), np.float32(0)
    top = magnitudes.max()
    return min(np.float32(magnitudes.mean(dtype=np.float64)), top), top


def _read_scalars(parts: Mapping[str, bytes], num: int, name: str) -> Floats:
    scales = parts.get("scales", b"")
    if len(scales) != 8 * num:
        raise WireError(f"{name}: {len(scales)} bytes of scalars, expected {8 * num}")
    found = np.frombuffer(scales, "<f4").reshape(-1, 2)
    if not ((found[:, 0] >= 0) & (found[:, 0] <= found[:, 1]) & np.isfinite(found[:, 1])).all():
        raise WireError(f"{name}: a mean is negative, above its maximum or not finite")
    return found


def _rest(
    parts: Mapping[str, bytes], scalars: Floats, left: Mask, layers: list[int], has_signs: bool
) -> _Rest:
    counts = [int(np.count_nonzero(piece)) for piece in _pieces(left, layers)]
    if not has_signs:
        return _Rest(np.zeros(0, bool), np.zeros(0, "<f4"), np.zeros(0, "<f4"))
    is_negative = unpacked_bits(parts[SIGNS], 1, sum(counts)).view(np.bool_)
    return _Rest(is_negative, np.repeat(scalars[:, 0], counts), np.repeat(scalars[:, 1], counts))


def _recovered(
    exact: Floats, stale: Floats, mask: Mask, rest: _Rest, recover: _Recover
) -> np.typing.NDArray[np.float64]:
    found = np.empty(stale.size, np.float64)
    found[mask] = exact
    found[~mask] = recover(stale[~mask], rest)
    return found
