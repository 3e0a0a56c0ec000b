"""``xor``: to the bit; what differs from the reference in the bits of float32, by bytes of equal rank, of all tensors together.

The lowest ranks are as good as noise where most elements changed. They travel as they are, up to the first rank with zeros in
it; from there on runs are looked for, of the zeros where nothing changed.
"""

from collections.abc import Mapping

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
    parted,
)
from fleetune.device_runtime.errors import WireError

NOISE, RUNS = "values", "values-runs"
"""Parts: the lowest ranks, and the others."""
_WIDTH = 4
_ZEROS = 32
"""Of so many bytes of a rank that is worth deflating one is zero, on average; of noise one of 256 is."""
_Words = NDArray[np.uint32]


def _encode(values: Tensors, reference: Tensors, memory: Memory) -> Encoded:
    names = sorted(values)
    changed = np.empty(sum(value.size for value in values.values()), "<f4")
    for name, own in parted(changed, values, names).items():
        np.bitwise_xor(_words(values[name]), _words(reference[name]), out=_words(own))
    ranks = _ranks(_words(changed))
    noisy = next((i for i, rank in enumerate(ranks) if _is_worth(rank)), _WIDTH)
    return Encoded({NOISE: ranks[:noisy].tobytes(), RUNS: ranks[noisy:].tobytes()}, values, {})


def _decode(parts: Mapping[str, bytes], reference: Tensors, memory: Memory) -> Decoded:
    check_parts("xor", parts, (NOISE, RUNS))
    count = sum(value.size for value in reference.values())
    noise, runs = (np.frombuffer(parts.get(part, b""), np.uint8) for part in (NOISE, RUNS))
    if noise.size + runs.size != _WIDTH * count or noise.size % max(1, count):
        raise WireError(f"xor: {noise.size} and {runs.size} bytes are no four ranks of {count} elements")
    found = parted(
        _joined([*noise.reshape(-1, max(1, count)), *runs.reshape(-1, max(1, count))], count),
        reference,
        reference,
    )
    for name, own in found.items():
        np.bitwise_xor(_words(own), _words(reference[name]), out=_words(own))
    return Decoded(found, {})


def _words(values: Floats) -> _Words:
    """The bits of float32 values, in place."""
    return values.view("<u4")


def _ranks(words: _Words) -> NDArray[np.uint8]:
    """(4, elements): bytes of equal rank, the lowest first; of ``words`` nothing is left."""
    ranks = np.empty((_WIDTH, words.size), np.uint8)
    for rank in ranks:  # Shifted: a transposed copy takes twice as long.
        np.copyto(rank, words, casting="unsafe")
        words >>= 8
    return ranks


def _joined(ranks: list[NDArray[np.uint8]], count: int) -> Floats:
    """The values that have these bytes."""
    words = np.zeros(count, "<u4")
    for rank in reversed(ranks):
        words <<= 8
        words |= rank
    return words.view("<f4")


def _is_worth(rank: NDArray[np.uint8]) -> bool:
    return _ZEROS * (rank.size - int(np.count_nonzero(rank))) >= rank.size


def _size_bytes_max(shapes: Shapes) -> int:
    return _WIDTH * sum(map(count_of, shapes.values()))


xor = Codec("xor", _encode, _decode, _size_bytes_max, frame=BY_KIND)
