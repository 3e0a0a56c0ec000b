"""``topk`` with bits: the largest differences of all tensors in 16, 8 or 4 bits each, their places as short as can be.

Source: Aji and Heafield, arXiv 1704.05021 (global threshold). The quantised values and the form of the places are ours.
"""

from collections.abc import Mapping

import numpy as np

from fleetune.device_runtime.arrays import Floats
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
from fleetune.device_runtime.contracts.codecs.halves import halved, widened
from fleetune.device_runtime.contracts.codecs.largest import largest, num_of
from fleetune.device_runtime.contracts.codecs.planes import HIGH, LOW, joined_planes, planes
from fleetune.device_runtime.contracts.codecs.positions import (
    packed_positions,
    places_of,
    position_bytes_max,
    unpacked_positions,
)
from fleetune.device_runtime.contracts.codecs.quantise import quantise, quantised_bytes, restore

HALF = 16
"""Bits of values in half precision; fewer are quantised."""


def sparse(ratio: float, bits: int) -> Codec:
    """Send the share ``ratio`` of all elements, at least one, in ``bits`` bits each."""

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        names = sorted(values)
        differences = moved(values, reference)
        mask = largest(np.abs(differences), num_of(ratio, differences.size))
        at = places_of(mask)
        parts, chosen = _packed(differences.take(at), bits)
        parts["positions"] = packed_positions(mask)
        differences.fill(0)
        differences[at] = chosen
        return Encoded(parts, shifted(reference, differences, names), {})

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts("topk", parts, (LOW, HIGH, "scales", "positions"))
        count = sum(value.size for value in reference.values())
        at = places_of(unpacked_positions(parts.get("positions", b""), count))
        steps = np.zeros(count, "<f4")
        steps[at] = _unpacked(parts, bits, at.size)
        return Decoded(shifted(reference, steps, reference), {})

    def bound(shapes: Shapes) -> int:
        count = sum(map(count_of, shapes.values()))
        num = num_of(ratio, count)
        values = 2 * num if bits == HALF else quantised_bytes(num, bits)
        return position_bytes_max(count, num) + values

    return Codec("topk", encode, decode, bound, frame=BY_KIND)


def _packed(chosen: Floats, bits: int) -> tuple[dict[str, bytes], Floats]:
    if bits < HALF:  # to the nearest: what is not sent makes the mean wrong anyway
        codes, scales, conveyed = quantise(chosen, bits, None)
        return {LOW: codes, "scales": scales}, conveyed
    halves, wide = halved(chosen, what="a difference", codec="topk")
    return planes([halves]), wide


def _unpacked(parts: Mapping[str, bytes], bits: int, num: int) -> Floats:
    low = parts.get(LOW, b"")
    if bits < HALF:
        return restore(low, parts.get("scales", b""), bits, num)
    return widened(joined_planes(low, parts.get(HIGH, b""), "<f2", num))
