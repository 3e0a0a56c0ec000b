"""``topk``: the largest differences of all tensors together, in half precision; all others are as in the reference.

Which elements travel is a bitmap or a list of indices, whichever is shorter for a tensor. So it was in release 0.1.0, and is
unless bits are asked for; with them it is :mod:`sparse`.

Source: Aji and Heafield, Sparse Communication for Distributed Gradient Descent, arXiv 1704.05021 (global threshold).
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Floats, Indices
from fleetune.device_runtime.contracts.codecs.codec import (
    Codec,
    Decoded,
    Doubles,
    Encoded,
    Memory,
    Shapes,
    Tensors,
    check_bits,
    check_ratio,
    count_of,
    difference,
)
from fleetune.device_runtime.contracts.codecs.halves import halved
from fleetune.device_runtime.contracts.codecs.largest import largest, num_of
from fleetune.device_runtime.contracts.codecs.sparse import sparse
from fleetune.device_runtime.errors import WireError

_BITMAP, _INDICES = b"\x00", b"\x01"
_INDEX, _HALF = np.dtype("<u4"), np.dtype("<f2")


def topk(ratio: float, bits: int) -> Codec:
    """Send the share ``ratio`` of all elements, at least one; equal magnitudes go by name and place.

    Raises:
        ConfigError: ``ratio`` is not above 0 and at most 1, or ``bits`` none of 4, 8 and 16.
    """
    check_ratio("topk", ratio)
    check_bits("topk", bits, (4, 8, 16))
    return sparse(ratio, bits) if bits else _of_0_1(ratio)


def _of_0_1(ratio: float) -> Codec:

    def encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
        differences = {n: difference(values[n], reference[n]).reshape(-1) for n in sorted(values)}
        parts: dict[str, bytes] = {}
        conveyed: dict[str, Doubles] = {}
        for name, at in _largest(differences, ratio).items():
            halves, steps = halved(differences[name][at], what="a difference", codec="topk")
            parts[name] = _part(at, halves, values[name].size)
            conveyed[name] = _moved(reference[name], at, steps)
        return Encoded(parts, conveyed, {})

    def bound(shapes: Shapes) -> int:
        counts = [count_of(shape) for shape in shapes.values()]
        places = min(
            sum(_bitmap_bytes(count) for count in counts), _INDEX.itemsize * num_of(ratio, sum(counts))
        )
        return len(counts) + places + _HALF.itemsize * num_of(ratio, sum(counts))

    return Codec("topk", encode, _decode, bound)


def _largest(differences: Mapping[str, Doubles], ratio: float) -> dict[str, Indices]:
    """Places of the largest magnitudes of all tensors, by tensor, ascending; zeros never travel."""
    flat = np.abs(np.concatenate([np.zeros(0), *differences.values()]))
    taken = largest(flat, num_of(ratio, flat.size))
    ends = np.cumsum([d.size for d in differences.values()])[:-1]
    pieces = np.split(taken, ends) if differences else []
    return {n: np.flatnonzero(piece) for n, piece in zip(differences, pieces, strict=True)}


def place_bytes(part: bytes, count: int) -> int:
    """Bytes of a part for ``count`` elements that say which of them travel."""
    if part[:1] == _BITMAP:
        return 1 + _bitmap_bytes(count)
    return 1 + (len(part) - 1) // (_INDEX.itemsize + _HALF.itemsize) * _INDEX.itemsize


def _part(at: Indices, halves: NDArray[np.float16], count: int) -> bytes:
    if _INDEX.itemsize * at.size < _bitmap_bytes(count):
        return _INDICES + at.astype(_INDEX).tobytes() + halves.tobytes()
    mask = np.zeros(count, bool)
    mask[at] = True
    return _BITMAP + np.packbits(mask, bitorder="little").tobytes() + halves.tobytes()


def _decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
    return Decoded({n: _value(n, part, reference[n]) for n, part in parts.items()}, {})


def _value(name: str, part: bytes, reference: Floats) -> Doubles:
    kind, body = part[:1], part[1:]
    if kind not in (_BITMAP, _INDICES):
        raise WireError(f"{name}: topk: neither a bitmap nor indices")
    at = _read_bitmap(body, reference.size) if kind == _BITMAP else _read_indices(body, reference.size)
    if at is None or len(body) < _HALF.itemsize * at.size:
        raise WireError(
            f"{name}: topk: {len(part)} bytes do not say which of {reference.size} elements travel"
        )
    halves = np.frombuffer(body[len(body) - _HALF.itemsize * at.size :], _HALF)
    return _moved(reference, at, halves.astype(np.float64))


def _read_indices(body: bytes, count: int) -> Indices | None:
    num, rest = divmod(len(body), _INDEX.itemsize + _HALF.itemsize)
    at = np.frombuffer(body, _INDEX, count=num).astype(np.int64)
    is_good = not rest and (np.diff(at) > 0).all() and (at < count).all()
    return at if is_good else None


def _read_bitmap(body: bytes, count: int) -> Indices | None:
    size = _bitmap_bytes(count)
    bits = np.unpackbits(np.frombuffer(body[:size], np.uint8), bitorder="little")
    at = np.flatnonzero(bits)
    is_good = len(body) == size + _HALF.itemsize * at.size and (at < count).all()
    return at if is_good else None


def _moved(reference: Floats, at: Indices, steps: Doubles) -> Doubles:
    value = np.array(reference, np.float64).reshape(-1)
    value[at] += steps
    return value.reshape(reference.shape)


def _bitmap_bytes(count: int) -> int:
    return (count + 7) // 8
