"""``innovation``: how a device's update differs from the one that it sent last, which both sides remember, in few bits.

A payload without parts repeats the last update of the tensors that it names: what a lazy device sends.

Source: Sun et al., LAQ, arXiv 1909.07588 (quantiser, laziness; both as its code has them); Zhao et al., AQUILA, arXiv 2308.00258
(level that goes by the innovation, from memory). EXTRA bits beside that level, and a range for each tensor are ours.
"""

from collections.abc import Iterable, Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Arrays, Floats
from fleetune.device_runtime.contracts.codecs.bits import WIDTHS, Codes, packed_bits, size_of, unpacked_bits
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
    of_kind,
)
from fleetune.device_runtime.contracts.codecs.quantise import LARGEST, LEAST
from fleetune.device_runtime.errors import WireError

LAST = "innovation"
"""Kind of memory of either side: the last update by tensor, float32."""
EXTRA = 2
"""Bits beyond the level of AQUILA, at which one payload alone would tell about nothing."""
SKIPS = "skips"
"""Kind of memory of either side: updates in a row that repeated the last one, int64 (1,); absent for none."""
SKIPS_MAX = 10
"""So many in a row at most: LAQ's clock, which is 100 steps in its code."""
BITS_MAX = 16
_PARTS = ("values", "scales", "protocol")


def innovation(ratio: float, bits: int) -> Codec:
    """Send each tensor's innovation in ``bits`` bits, 1 to 16; 0 for the adaptive level. ConfigError for others, or a ratio."""
    check_no_ratio("innovation", ratio)
    check_bits("innovation", bits, tuple(range(1, BITS_MAX + 1)))

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        names, last = sorted(values), of_kind(LAST, memory)
        ranges, levels = np.empty(len(names), "<f4"), np.empty(len(names), np.uint8)
        now: dict[str, Floats] = {}
        groups: dict[int, list[Codes]] = {width: [] for width in WIDTHS}
        for i, name in enumerate(names):
            update, before = _moved(values[name], reference[name]), _before(last, name, reference)
            found = update if before is None else update - before
            ranges[i] = _range(found)
            levels[i] = bits or _level(found, ranges[i])
            codes = _codes(found, ranges[i], int(levels[i]))
            groups[_width(int(levels[i]))].append(codes)
            now[name] = _after(before, codes, ranges[i], int(levels[i])).reshape(values[name].shape)
        packed = [_joined(group, width) for width, group in groups.items() if group]
        parts = {"values": b"".join(packed), "scales": ranges.tobytes(), "protocol": levels.tobytes()}
        conveyed = {n: np.add(reference[n], now[n], dtype=np.float64) for n in names}
        return Encoded(parts, conveyed, _memory(memory, parts, now))

    def decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
        check_parts("innovation", parts, _PARTS)
        if reference and not parts:
            return _repeated(reference, memory)
        last = of_kind(LAST, memory)
        ranges, levels = _read_grid(parts, len(reference))
        pieces = _unpacked(parts.get("values", b""), levels, [value.size for value in reference.values()])
        now: dict[str, Floats] = {}
        for (name, held), codes, span, level in zip(reference.items(), pieces, ranges, levels, strict=True):
            before = _before(last, name, reference)
            now[name] = _after(before, codes, span, level).reshape(held.shape)
        values = {n: np.add(held, now[n], dtype=np.float64) for n, held in reference.items()}
        return Decoded(values, _memory(memory, parts, now))

    def bound(shapes: Shapes) -> int:
        width = _width(bits or BITS_MAX)
        return sum(size_of(count_of(shape), width) + 6 for shape in shapes.values()) + len(WIDTHS)

    kinds = (LAST, CHAIN, SKIPS)
    return Codec("innovation", encode, decode, bound, sender=kinds, receiver=kinds, frame=BY_KIND)


def repeating(codec: Codec) -> Codec:
    """Have ``codec`` send nothing of the tensors that it is given but their names: the last update of each counts again.

    Encoding raises WireError if one is not remembered, or after SKIPS_MAX in a row.
    """

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        conveyed, kept = _repeated({name: reference[name] for name in sorted(values)}, memory)
        return Encoded({}, conveyed, kept)

    return codec._replace(encode=encode)


def skips_of(memory: Memory) -> int:
    """How many updates in a row have repeated the last one."""
    found = memory.get(f"{SKIPS}/")
    return 0 if found is None else int(np.asarray(found, np.int64)[0])


def is_lazy(step_norm2: float, errors_norm2: float, moved2: float) -> bool:
    """Whether an update is worth no upload: its innovation is below what the model moved of late, and what quantising costs.

    Args:
        step_norm2: squared L2 norm of the quantised innovation.
        errors_norm2: those of what quantising left of this update and of the last one that was sent, together.
        moved2: weighted sum of those of the last differences between global models; 0 or less: none is to be skipped.

    Source: LAQ, condition (7a) as its code has it: ||dq||^2 <= 1/(alpha^2 M^2) sum_d xi_d ||theta_d - theta_d-1||^2 +
    3 (||e||^2 + ||e_last||^2). There q are gradients of which M are summed with step alpha; here they are updates of which the
    mean is taken, so that alpha M = 1.
    """
    return moved2 > 0 and step_norm2 <= moved2 + 3 * errors_norm2


def _repeated(reference: Tensors, memory: Memory) -> Decoded:
    """The last updates over this reference, and the memory that says so."""
    last, count = of_kind(LAST, memory), skips_of(memory) + 1
    found = {name: _before(last, name, reference) for name in reference}
    if lacking := [name for name, before in found.items() if before is None]:
        raise WireError(f"innovation: {lacking[0]} is repeated, and no update of it is remembered")
    if count > SKIPS_MAX:
        raise WireError(f"innovation: repeated more than {SKIPS_MAX} times in a row")
    now = {n: before.reshape(reference[n].shape) for n, before in found.items() if before is not None}
    values = {n: np.add(reference[n], value, dtype=np.float64) for n, value in now.items()}
    return Decoded(values, {**_memory(memory, {}, now), f"{SKIPS}/": np.array([count], np.int64)})


def _moved(value: Floats, held: Floats) -> Floats:
    """Flat."""
    with np.errstate(over="ignore"):
        return value.reshape(-1) - held.reshape(-1)


def _before(last: Arrays, name: str, reference: Tensors) -> Floats | None:
    """The last update of a tensor, flat; None if there is none, or one of another shape."""
    known = last.get(name)
    if known is None or known.shape != reference[name].shape:
        return None
    return np.asarray(known, "<f4").reshape(-1)


def _memory(memory: Memory, parts: Mapping[str, bytes], now: Mapping[str, Floats]) -> Arrays:
    told = b"".join(parts.get(kind, b"") for kind in _PARTS)
    chain = sha256(chain_of(memory).encode() + "\n".join(now).encode() + b"\0" + told).digest()
    kept = {key: np.asarray(value) for key, value in memory.items() if key.startswith(f"{LAST}/")}
    return {**kept, **as_kind(LAST, now), f"{CHAIN}/": np.frombuffer(chain, np.uint8)}


def _range(found: Floats) -> np.float32:
    """Largest magnitude; 0 for less than LEAST."""
    span = np.abs(found).max(initial=np.float32(0))
    if not span <= LARGEST:
        raise WireError("cannot pack: a difference beyond 2**100 does not fit innovation")
    return np.float32(0) if span < LEAST else np.float32(span)


def _level(found: Floats, span: np.float32) -> int:
    if not span:
        return 1
    norm = float(np.sqrt(np.square(found, dtype=np.float64).sum()))
    return min(BITS_MAX, int(np.log2(float(span) * np.sqrt(found.size) / norm + 1)) + EXTRA)


def _codes(found: Floats, span: np.float32, level: int) -> Codes:
    """Nearest of 2**level points from -span to span."""
    top = np.float32(2**level - 1)
    scaled = found + span
    scaled *= top / (2 * span) if span else np.float32(0)
    scaled += np.float32(0.5)
    np.minimum(scaled, top, out=scaled)
    return scaled.astype(np.uint8) if level <= 8 else scaled.astype(np.uint16)


def _after(before: Floats | None, codes: Codes, span: np.float32, level: int) -> Floats:
    """The update that both sides know once the codes have come."""
    now = codes.astype("<f4")
    now *= 2 * span / np.float32(2**level - 1)
    now -= span
    if before is not None:
        now += before
    return now


def _joined(group: list[Codes], width: int) -> bytes:
    codes: NDArray[Any] = np.concatenate(group)
    return packed_bits(codes, width)


def _width(level: int) -> int:
    return next(width for width in WIDTHS if width >= level)


def _unpacked(data: bytes, levels: list[int], sizes: list[int]) -> list[Codes]:
    """Codes of each tensor; they lie by their width in bits, narrowest first."""
    widths = [_width(level) for level in levels]
    counts = {width: sum(s for s, w in zip(sizes, widths, strict=True) if w == width) for width in WIDTHS}
    if len(data) != (expected := sum(size_of(count, width) for width, count in counts.items())):
        raise WireError(f"innovation: {len(data)} bytes of values, expected {expected}")
    groups, at = {}, 0
    for width, count in counts.items():
        groups[width] = unpacked_bits(data[at : at + size_of(count, width)], width, count)
        at += size_of(count, width)
    return [*_pieces(groups, widths, levels, sizes)]


def _pieces(
    groups: dict[int, Codes], widths: list[int], levels: list[int], sizes: list[int]
) -> Iterable[Codes]:
    taken = dict.fromkeys(WIDTHS, 0)
    for width, level, size in zip(widths, levels, sizes, strict=True):
        piece = groups[width][taken[width] : taken[width] + size]
        taken[width] += size
        if width > level and piece.size and piece.max() >> level:
            raise WireError("innovation: a value beyond its level")
        yield piece


def _read_grid(parts: Mapping[str, bytes], num: int) -> tuple[NDArray[np.float32], list[int]]:
    """Range and level of each tensor."""
    scales, protocol = parts.get("scales", b""), parts.get("protocol", b"")
    if (len(scales), len(protocol)) != (4 * num, num):
        raise WireError(f"innovation: ranges or levels are not those of {num} tensors")
    ranges, levels = np.frombuffer(scales, "<f4"), [*protocol]
    if not ((ranges >= 0) & (ranges <= LARGEST)).all():
        raise WireError("innovation: a range is negative, not finite or beyond 2**100")
    if not all(1 <= level <= BITS_MAX for level in levels):
        raise WireError(f"innovation: a level is not from 1 to {BITS_MAX}")
    return ranges, levels
