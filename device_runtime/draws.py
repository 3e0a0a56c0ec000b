"""Random draws that any language repeats: Philox4x32-10 by counter, then integers, + - * / and comparisons alone.

A draw is a pure function of its :class:`Key` and its place in it; nothing is carried from draw to draw. ``docs/draws.md`` says
how another language repeats each, ``tests/data/draws.json`` holds it to that.
"""

from collections.abc import Iterable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.tables import Table

Words = NDArray[np.uint32]
Doubles = NDArray[np.float64]
_Word = TypeVar("_Word", int, Indices)

SEED_MAX = 2**53 - 1
"""Largest seed, and largest integer drawn: every language and every JSON reader holds it exactly."""
STREAMS: Table[int] = Table(
    "stream of draws",
    {
        "plans": 1,
        "batches": 2,
        "selection": 3,
        "devices": 4,
        "personal": 5,
        "effects": 9,
        "configurator": 10,
        "held-out": 11,
        "rounding": 16,
        "rows": 20,
        "sketch": 21,
        "eval-split": 24,
        "jitter": 30,
        "tokens": 40,
    },
)
"""One number per purpose, so that equal (seed, number) of two purposes share no draw. A number once given stays."""

_ROUNDS = 10
_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_WEYL = 0x9E3779B9, 0xBB67AE85
_LOW, _HALF = np.uint64(0xFFFFFFFF), np.uint64(32)


class Key(NamedTuple):
    """What draws are for. Keys that differ anywhere use different counters.

    ``stream`` is a name in :data:`STREAMS`. ``number`` is a step, an epoch or a round, and ``part`` a place in it; both are below
    2**32.
    """

    seed: int
    stream: str
    number: int
    part: int = 0


class Draws:
    """The draws of one step, epoch or round. Each call takes the next part of the key: no call repeats another's draws."""

    def __init__(self, seed: int, stream: str, number: int) -> None:
        self._next = Key(seed, stream, number)

    def uniforms(self, count: int) -> Doubles:
        """Draw as :func:`uniforms`."""
        return uniforms(self._take(), count)

    def permutation(self, count: int) -> Indices:
        """Draw as :func:`permutation`."""
        return permutation(self._take(), count)

    def weighted(self, weights: Doubles, *, count: int) -> Indices:
        """Draw as :func:`weighted`."""
        return weighted(self._take(), weights, count=count)

    def _take(self) -> Key:
        key = self._next
        self._next = key._replace(part=key.part + 1)
        return key


def philox(counters: Words, key: tuple[int, int]) -> Words:
    """Map counters (n, 4) to random words (n, 4) by Philox4x32-10 under a key of two words.

    Source: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
    """
    return _mixed(np.ascontiguousarray(counters.T).astype(np.uint64), key)


def _mixed(columns: Iterable[NDArray[np.uint64]], key: tuple[int, int]) -> Words:
    """Words (n, 4) of the four words of counters, each (n,), or (1,) if it is the same in all; they are overwritten."""
    c0, c1, c2, c3 = columns
    for i in range(_ROUNDS):
        k0, k1 = (np.uint64((word + i * weyl) % 2**32) for word, weyl in zip(key, _WEYL, strict=True))
        c0 *= _MULTIPLIERS[0]
        c2 *= _MULTIPLIERS[1]
        c1 ^= k0
        c3 ^= k1
        c0, c1, c2, c3 = _crossed(c2, c1), c2, _crossed(c0, c3), c0
    c1 <<= _HALF
    c3 <<= _HALF
    pairs = np.empty((len(c0), 2), "<u8")
    np.bitwise_or(c0, c1, out=pairs[:, 0])
    np.bitwise_or(c2, c3, out=pairs[:, 1])
    return pairs.view("<u4")


def _mixed_one(counter: list[int], k0: int, k1: int) -> list[int]:
    """As :func:`_mixed` of one counter; arrays of one element would take ten times as long."""
    c0, c1, c2, c3 = counter
    first, second = map(int, _MULTIPLIERS)
    for _ in range(_ROUNDS):
        p0, p2 = c0 * first, c2 * second
        c0, c1, c2, c3 = (p2 >> 32) ^ c1 ^ k0, p2 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + _WEYL[0]) % 2**32, (k1 + _WEYL[1]) % 2**32
    return [c0, c1, c2, c3]


def _crossed(product: NDArray[np.uint64], other: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Upper half of a product, XOR ``other``; the product keeps its lower half."""
    upper = product >> _HALF
    product &= _LOW
    return upper ^ other


def words(key: Key, count: int) -> Words:
    """Draw ``count`` words of 32 bits: word i is word i % 4 of counter (i // 4, number, part, stream) under the seed's halves.

    Raises:
        ConfigError: the seed, number or part is out of range, or the stream is unknown.
    """
    _check(key)
    if count <= 4:
        return np.array(_first_words(key)[:count], "<u4")
    places = np.arange(-(-count // 4), dtype=np.uint64)
    # What is the same in all counters stays one word until it differs: a round less.
    same = np.array([[key.number], [key.part], [STREAMS[key.stream]]], np.uint64)
    return _mixed((places, *same), (key.seed % 2**32, key.seed >> 32)).ravel()[:count]


def _first_words(key: Key) -> list[int]:
    seed = int(key.seed)  # int: numbers of NumPy overflow where Python's do not
    counter = [0, int(key.number), int(key.part), STREAMS[key.stream]]
    return _mixed_one(counter, seed % 2**32, seed >> 32)


def integers(key: Key, count: int) -> Indices:
    """Draw ``count`` integers of 53 bits: 27 upper bits of one word, then 26 upper bits of the next."""
    pairs = words(key, 2 * count).reshape(count, 2).astype(np.int64)
    return _of_53_bits(pairs[:, 0], pairs[:, 1])


def _of_53_bits(upper: _Word, lower: _Word) -> _Word:
    return (upper >> 5) * 2**26 + (lower >> 6)


def uniforms(key: Key, count: int) -> Doubles:
    """Draw ``count`` numbers in [0, 1): :func:`integers` divided by 2**53."""
    return integers(key, count) / 2.0**53


def uniform(key: Key) -> float:
    """Draw the first of :func:`uniforms` alone, without an array."""
    _check(key)
    upper, lower, *_ = _first_words(key)
    return _of_53_bits(upper, lower) / 2.0**53


def permutation(key: Key, count: int) -> Indices:
    """Order 0 … count - 1 at random: by one integer each, equal ones by place."""
    return np.argsort(integers(key, count), kind="stable")


def weighted(key: Key, weights: Doubles, *, count: int) -> Indices:
    """Draw ``count`` places without replacement, each next one by its share of the weights that are left.

    Draw u takes the first place whose running sum (from place 0, one addition at a time) exceeds u times the whole sum. The
    weight of a place that is taken becomes 0.

    Raises:
        ValueError: fewer than ``count`` weights are above 0, or one is negative or not finite.
    """
    left = np.array(weights, np.float64)
    if not np.isfinite(left).all() or (left < 0).any() or np.count_nonzero(left) < count:
        raise ValueError(
            f"{count} of weights {left.tolist()}: so many must be above 0, all finite, none negative"
        )
    places = np.empty(count, np.int64)
    for i, u in enumerate(uniforms(key, count)):
        ends = np.cumsum(left)
        places[i] = np.searchsorted(ends, u * ends[-1], side="right")
        left[places[i]] = 0.0
    return places


def _check(key: Key) -> None:
    if not 0 <= key.seed <= SEED_MAX:
        raise ConfigError(f"seed {key.seed}: from 0 to 2**53 - 1")
    for name, value in (("number", key.number), ("part", key.part)):
        if not 0 <= value < 2**32:
            raise ConfigError(f"draws for {key.stream}: {name} {value}; from 0 to 2**32 - 1")
