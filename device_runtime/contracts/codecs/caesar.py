"""``caesar``: the largest elements of each layer exactly, of the others signs and two scalars; stale values help to recover them.

Source: Yan et al., Caesar, arXiv 2412.19989, as a third party's code has it (sizes, scalars and the test of sign and bound).
Ours: whole layers instead of tensors, a bitmap or gaps for the places, float16 as a choice for what is exact, and that the stale
adapter is the one that the receiver started from last. The sender holds it too, so it knows to the bit what is recovered.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Floats
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
from fleetune.device_runtime.contracts.codecs.halves import halved, widened
from fleetune.device_runtime.contracts.codecs.largest import largest
from fleetune.device_runtime.contracts.codecs.planes import HIGH, LOW, joined_planes, planes
from fleetune.device_runtime.contracts.codecs.positions import (
    Mask,
    packed_positions,
    places_of,
    position_bytes_max,
    unpacked_positions,
)
from fleetune.device_runtime.errors import WireError

SIGNS = "values-signs"
_DTYPES = {16: "<f2", 32: "<f4"}
_LAYER = re.compile(r".*?\.\d+(?=\.)")


_PARTS = (LOW, HIGH, "positions", SIGNS, "scales")


class _Told(NamedTuple):
    """What travels of the elements of one layer that are not exact."""

    is_negative: Mask
    mean: np.float32
    largest: np.float32
    """Of their magnitudes."""


_Recover = Callable[[Floats, _Told], Floats]
"""(stale values, what travels) -> values, of the elements of a layer that are not exact."""


def caesar(name: str, recover: _Recover | None) -> Callable[[float, int], Codec]:
    """Make the codecs of one way to recover, None for zeros and no signs.

    They raise ConfigError for a ratio not above 0 and at most 1, or bits other than 16 and 32.
    """

    def make(ratio: float, bits: int) -> Codec:
        check_ratio(name, ratio)
        check_bits(name, bits, tuple(_DTYPES))
        return _codec(name, ratio, bits or 32, recover)

    return make


def layers_of(names: Iterable[str]) -> list[list[str]]:
    """Names of each layer vector: neighbours in the order of names that are equal up to their first number.

    Neighbours without a number are one layer too.
    """
    grouped = groupby(sorted(names), key=lambda name: found[0] if (found := _LAYER.match(name)) else "")
    return [[*layer] for _, layer in grouped]


def by_stale(stale: Floats, told: _Told) -> Floats:
    """The stale value where its sign and magnitude may be right, else the signed mean."""
    found = told.is_negative.astype("<u4")
    found <<= 31
    # In bits: choices at random cost np.where a mispredicted branch each. Below zero is what has the other sign.
    magnitudes = (stale + np.float32(0)).view("<u4")  # -0 counts as 0
    magnitudes ^= found
    taken = (magnitudes <= np.abs(told.largest).view("<u4")).astype("<u4")
    np.negative(taken, out=taken)
    found |= told.mean.view("<u4")
    taken &= np.bitwise_xor(found, stale.view("<u4"), out=magnitudes)
    found ^= taken
    return found.view("<f4")


def by_sign(stale: Floats, told: _Told) -> Floats:
    """The signed mean."""
    bits = told.is_negative.astype("<u4")
    bits <<= 31
    bits |= told.mean.view("<u4")
    return bits.view("<f4")


def _codec(name: str, ratio: float, bits: int, recover: _Recover | None) -> Codec:
    dtype = _DTYPES[bits]

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        found: dict[str, Floats] = {}
        masks, exacts, signs = [np.zeros(0, bool)], [np.zeros(0, dtype)], [np.zeros(0, bool)]
        scalars = []
        for names in layers_of(values):
            flat = joined(values, names)
            mask = largest(np.abs(flat), _num_exact(ratio, flat.size))
            rounded, after = _rounded(flat, bits, name)
            masks.append(mask)
            exacts.append(rounded.take(places_of(mask)))
            left = places_of(~mask)
            if recover:
                told = _told(flat.take(left))
                after[left] = recover(joined(reference, names).take(left), told)
                signs.append(told.is_negative)
                scalars.append(told[1:])
            else:
                after[left] = 0
            found |= parted(after, values, names)
        parts = {**planes(exacts), "positions": packed_positions(np.concatenate(masks))}
        if recover:
            parts[SIGNS] = packed_bits(np.concatenate(signs).view(np.uint8), 1)
            parts["scales"] = np.array(scalars, "<f4").tobytes()
        return Encoded(parts, found, {})

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts(name, parts, _PARTS if recover else _PARTS[:3])
        layers, count = layers_of(reference), sum(value.size for value in reference.values())
        mask = unpacked_positions(parts.get("positions", b""), count)
        num = int(np.count_nonzero(mask))
        exact = joined_planes(parts.get(LOW, b""), parts.get(HIGH, b""), dtype, num)
        below, scalars = np.zeros(count - num, bool), np.zeros((len(layers), 2), "<f4")
        if recover:
            below, scalars = _read_rest(parts, count - num, len(layers), name)
        found: dict[str, Floats] = {}
        start = done = 0  # elements, and exact ones, of the layers before
        for names, (mean, top) in zip(layers, scalars, strict=True):
            stale = joined(reference, names)
            own, after = mask[start : start + stale.size], np.zeros_like(stale)
            at = places_of(own)
            after[at] = _wide(exact[done : done + at.size])
            if recover:
                left = places_of(~own)
                told = _Told(below[start - done :][: left.size], mean, top)
                after[left] = recover(stale.take(left), told)
            found |= parted(after, reference, names)
            start, done = start + stale.size, done + at.size
        return Decoded(found, {})

    def bound(shapes: Shapes) -> int:
        sizes = [sum(count_of(shapes[n]) for n in names) for names in layers_of(shapes)]
        count = sum(sizes)
        # Of fewer tensors there may be more layers, each with one exact element at least.
        num = min(count, len(shapes) + sum(_num_exact(ratio, size) for size in sizes))
        signs = size_of(count, 1) + 8 * len(shapes) if recover else 0
        return bits // 8 * num + signs + position_bytes_max(count, num)

    return Codec(name, encode, decode, bound, frame=BY_KIND)


def _num_exact(ratio: float, count: int) -> int:
    return min(count, max(1, int(count * ratio)))


def _rounded(values: Floats, bits: int, name: str) -> tuple[Array, Floats]:
    """Values as they travel where they are exact, and the same as float32, to be written."""
    if bits == 32:
        return values, values.copy()
    return halved(values, what="a value", codec=f"{name} with 16 bits")


def _wide(exact: Array) -> Floats:
    """Exact values that came, as float32."""
    return widened(exact) if exact.dtype == np.float16 else np.asarray(exact, "<f4")


def _told(rest: Floats) -> _Told:
    """What travels of elements that are not exact; scalars of 0 if there are none."""
    magnitudes = np.abs(rest)
    top = magnitudes.max(initial=np.float32(0))
    mean = np.float32(magnitudes.sum(dtype=np.float64) / max(1, rest.size))
    return _Told(rest < 0, min(mean, top), top)


def _read_rest(parts: Mapping[str, bytes], num: int, layers: int, name: str) -> tuple[Mask, Floats]:
    """Whether each of ``num`` elements is below zero, and (layers, 2): mean and largest magnitude."""
    signs, scales = parts.get(SIGNS, b""), parts.get("scales", b"")
    if (len(signs), len(scales)) != (size_of(num, 1), 8 * layers):
        raise WireError(f"{name}: signs or scalars are not those of {num} elements in {layers} layers")
    scalars = np.frombuffer(scales, "<f4").reshape(-1, 2)
    if not ((scalars[:, 0] >= 0) & (scalars[:, 0] <= scalars[:, 1]) & np.isfinite(scalars[:, 1])).all():
        raise WireError(f"{name}: a mean is negative, above its maximum or not finite")
    return unpacked_bits(signs, 1, num).view(np.bool_), scalars
