"""``xor``: to the bit; what differs from the reference in the bits of float32, by bytes of equal rank, of all tensors together.

The lowest ranks are as good as noise where most elements changed, the others have zeros. Each rank is a part, and is deflated by
itself where that is worth while.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

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
    joined,
    parted,
)
from fleetune.device_runtime.errors import WireError

RANKS = ("values-0", "values-1", "values-2", "values-3")
"""Parts: bytes of equal rank, the lowest first."""
_Words = NDArray[np.uint32]


def _encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
    names = sorted(values)
    changed = joined(values, names)
    _differing(changed, reference, names)
    return Encoded(_ranks(_words(changed)), values, {})


def _decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
    check_parts("xor", parts, RANKS)
    count = sum(value.size for value in reference.values())
    ranks = [parts.get(part, b"") for part in RANKS]
    if any(len(rank) != count for rank in ranks):
        raise WireError(f"xor: ranks of {[*map(len, ranks)]} bytes, expected {count} each")
    return Decoded(_differing(_of_ranks(ranks, count), reference, reference), {})


def _differing(flat: Floats, reference: Tensors, names: Iterable[str]) -> dict[str, Floats]:
    """Tensors of a joined array, whose bits become XOR those of the reference."""
    found = parted(flat, reference, names)
    for name, own in found.items():
        np.bitwise_xor(_words(own), _words(reference[name]), out=_words(own))
    return found


def _words(values: Floats) -> _Words:
    """The bits of float32 values, in place."""
    return values.view("<u4")


def _ranks(words: _Words) -> dict[str, bytes]:
    """Parts; of ``words`` nothing is left."""
    found = {}
    for part in RANKS:  # Shifted: a transposed copy takes twice as long.
        found[part] = words.astype(np.uint8).tobytes()
        words >>= 8
    return found


def _of_ranks(ranks: Sequence[bytes], count: int) -> Floats:
    """The values that have these bytes."""
    words = np.zeros(count, "<u4")
    for rank in reversed(ranks):
        words <<= 8
        words |= np.frombuffer(rank, np.uint8)
    return words.view("<f4")


def _size_bytes_max(shapes: Shapes) -> int:
    return len(RANKS) * sum(map(count_of, shapes.values()))


xor = Codec("xor", _encode, _decode, _size_bytes_max, frame=BY_KIND)
