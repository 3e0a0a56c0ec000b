"""``quant``: differences in 1, 2, 4, 8 or 16 bits, one scale for each block of elements; no memory (see ``quantise``)."""

from collections.abc import Mapping

from fleetune.device_runtime.contracts.codecs.bits import WIDTHS
from fleetune.device_runtime.contracts.codecs.codec import (
    BY_KIND,
    Codec,
    Decoded,
    Encoded,
    Memory,
    Shapes,
    Tensors,
    check_bits,
    check_no_ratio,
    check_parts,
    count_of,
    joined,
    moved,
    parted,
    plus,
)
from fleetune.device_runtime.contracts.codecs.quantise import quantise, quantised_bytes, restore

BITS = 8
"""Unless others are asked for."""


def quant(ratio: float, bits: int) -> Codec:
    """Send every element in ``bits`` bits; ConfigError for a ratio, or other bits than 1, 2, 4, 8 and 16."""
    check_no_ratio("quant", ratio)
    check_bits("quant", bits, WIDTHS)
    width = bits or BITS

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        names = sorted(values)
        differences, held = moved(values, reference)
        codes, scales, conveyed = quantise(differences, width, "\n".join(names))
        return Encoded(
            {"values": codes, "scales": scales}, parted(plus(held, conveyed), reference, names), {}
        )

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts("quant", parts, ("values", "scales"))
        held = joined(reference, reference)
        steps = restore(parts.get("values", b""), parts.get("scales", b""), width, held.size)
        return Decoded(parted(plus(held, steps), reference, reference), {})

    def bound(shapes: Shapes) -> int:
        return quantised_bytes(sum(map(count_of, shapes.values())), width)

    return Codec("quant", encode, decode, bound, frame=BY_KIND)
