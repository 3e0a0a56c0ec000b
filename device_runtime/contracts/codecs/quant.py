"""``quant``: differences in 1, 2, 3, 4, 8 or 16 bits, one scale for each block of elements; no memory (see ``quantise``)."""

from collections.abc import Mapping

import numpy as np

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
    moved,
    shifted,
)
from fleetune.device_runtime.contracts.codecs.planes import HIGH, LOW, joined_planes, planes
from fleetune.device_runtime.contracts.codecs.quantise import quantise, quantised_bytes, restore

BITS = 8
"""Unless others are asked for."""
_PLANED = 16
"""Bits of codes whose lower bytes are not worth entropy-coding."""


def quant(ratio: float, bits: int) -> Codec:
    """Send every element in ``bits`` bits; ConfigError for a ratio, or other bits than 1, 2, 3, 4, 8 and 16."""
    check_no_ratio("quant", ratio)
    check_bits("quant", bits, (1, 2, 3, 4, 8, 16))
    width = bits or BITS

    def encode_by(name: str | None, values: Tensors, reference: Tensors) -> Encoded:
        names = sorted(values)
        codes, scales, conveyed = quantise(moved(values, reference), width, name)
        parts = planes([np.frombuffer(codes, "<u2")]) if width == _PLANED else {LOW: codes}
        return Encoded({**parts, "scales": scales}, shifted(reference, conveyed, names), {})

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        # A step of 16 bits is too small for its mean to matter, and drawing takes a fifth of the time.
        return encode_by(None if width == _PLANED else "\n".join(sorted(values)), values, reference)

    def encode_nearest(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        return encode_by(None, values, reference)

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts("quant", parts, (LOW, HIGH, "scales") if width == _PLANED else (LOW, "scales"))
        count = sum(value.size for value in reference.values())
        low = parts.get(LOW, b"")
        codes: bytes | memoryview = low
        if width == _PLANED:
            codes = joined_planes(low, parts.get(HIGH, b""), "<u2", count).view(np.uint8).data
        steps = restore(codes, parts.get("scales", b""), width, count)
        return Decoded(shifted(reference, steps, reference), {})

    def bound(shapes: Shapes) -> int:
        return quantised_bytes(sum(map(count_of, shapes.values())), width)

    has_draws = width not in (1, _PLANED)
    nearest = encode_nearest if has_draws else None
    return Codec("quant", encode, decode, bound, frame=BY_KIND, encode_nearest=nearest)
