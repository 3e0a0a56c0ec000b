"""``topk`` with bits: the largest differences of all tensors in 16, 8 or 4 bits each, their places as short as can be.

Source: Aji and Heafield, arXiv 1704.05021 (global threshold). The quantised values and the form of the places are ours.
"""

from collections.abc import Mapping

import numpy as np

from fleetune.device_runtime.arrays import Floats, Indices
from fleetune.device_runtime.contracts.codecs.codec import (
    BY_KIND,
    Codec,
    Decoded,
    Encoded,
    Memory,
    Shapes,
    Tensors,
    check_parts,
    count_of,
    moved,
    shifted,
)
from fleetune.device_runtime.contracts.codecs.largest import largest, num_of
from fleetune.device_runtime.contracts.codecs.planes import HIGH, LOW, joined_planes, planes
from fleetune.device_runtime.contracts.codecs.positions import (
    packed_positions,
    position_bytes_max,
    unpacked_positions,
)
from fleetune.device_runtime.contracts.codecs.quantise import quantise, quantised_bytes, restore
from fleetune.device_runtime.errors import WireError

HALF = 16
"""Bits of values in half precision; fewer are quantised."""


def sparse(ratio: float, bits: int) -> Codec:
    """Send the share ``ratio`` of all elements, at least one, in ``bits`` bits each."""

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        names = sorted(values)
        differences = moved(values, reference)
        mask = largest(np.abs(differences), num_of(ratio, differences.size))
        at = np.flatnonzero(mask)
        parts, chosen = _packed(differences[at], bits, "\n".join(names))
        parts["positions"] = packed_positions(mask)
        steps = _steps(differences.size, at, chosen)
        return Encoded(parts, shifted(reference, steps, names), {})

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts("topk", parts, (LOW, HIGH, "scales", "positions"))
        count = sum(value.size for value in reference.values())
        at = np.flatnonzero(unpacked_positions(parts.get("positions", b""), count))
        steps = _steps(count, at, _unpacked(parts, bits, at.size))
        return Decoded(shifted(reference, steps, reference), {})

    def bound(shapes: Shapes) -> int:
        count = sum(map(count_of, shapes.values()))
        num = num_of(ratio, count)
        values = 2 * num if bits == HALF else quantised_bytes(num, bits)
        return position_bytes_max(count, num) + values

    return Codec("topk", encode, decode, bound, frame=BY_KIND)


def _packed(chosen: Floats, bits: int, name: str) -> tuple[dict[str, bytes], Floats]:
    if bits < HALF:
        codes, scales, conveyed = quantise(chosen, bits, name)
        return {LOW: codes, "scales": scales}, conveyed
    with np.errstate(over="ignore"):
        halves = chosen.astype("<f2")
    if not np.isfinite(halves).all():
        raise WireError("cannot pack: a difference beyond 65504 does not fit topk")
    return planes(halves), halves.astype("<f4")


def _unpacked(parts: Mapping[str, bytes], bits: int, num: int) -> Floats:
    low = parts.get(LOW, b"")
    if bits < HALF:
        return restore(low, parts.get("scales", b""), bits, num)
    return joined_planes(low, parts.get(HIGH, b""), "<f2", num).astype("<f4")


def _steps(count: int, at: Indices, chosen: Floats) -> Floats:
    steps = np.zeros(count, "<f4")
    steps[at] = chosen
    return steps
