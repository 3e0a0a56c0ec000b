"""Means that a minority of liars cannot move far: they need all updates of a round, and count each device once.

Trimmed mean and median: Yin et al., arXiv 1803.01498. Krum and Multi-Krum: Blanchard et al., NeurIPS 2017 (arXiv 1703.02757).
How many updates may be wrong is the job's ``outliers``, a share of those that came. Honest devices with data unlike all others'
are outliers to each of them: in a skewed fleet they cost accuracy, Krum most.

Updates are read block by block, one in memory at a time: a block of all devices is at most BLOCK_BYTES, and as much again while
it is sorted. A fleet that needs n blocks is read n times.
"""

import math
from collections.abc import Callable, Iterator
from itertools import combinations
from typing import NamedTuple

import numpy as np

from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.bounds import started
from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import (
    Gathered,
    Strategy,
    Update,
    add_to_sums,
    check_values,
    init_sums,
)
from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.codecs.codec import Doubles

BLOCK_BYTES = 64 * 1024 * 1024


class _Piece(NamedTuple):
    """Elements of one tensor, in C order."""

    name: str
    start: int
    stop: int


Reduce = Callable[[Doubles, float], Doubles]
"""(values (devices, elements), share of them that may be wrong) -> (elements,)"""


def median() -> Strategy:
    """Median of each element over the updates that hold its tensor; of an even number the mean of the middle two.

    Source: arXiv 1803.01498, definition 1. Fewer than half of the devices move no element beyond what honest ones have.
    """
    return _of_elements(lambda values, _: np.median(values, axis=0))


def trimmed() -> Strategy:
    """Mean of each element without its largest and smallest values, a share ``outliers`` of the devices on either side.

    Source: arXiv 1803.01498, definition 2. The number left out is rounded up; one or two values stay.
    """
    return _of_elements(_trimmed_mean)


def krum() -> Strategy:
    """The one update that is nearest to its n - f - 2 nearest others, f of n being the share ``outliers``, rounded up.

    A tensor that an update does not hold counts as not moved. Equal scores: the first device by name.

    Source: arXiv 1703.02757, section 4; its guarantee needs n of 2 f + 3 or more.
    """
    return _of_chosen(lambda num, wrong: 1)


def multi_krum() -> Strategy:
    """Mean of the n - f updates with the best scores of ``krum``, each counted once.

    Source: arXiv 1703.02757, section 6, where the number is left open.
    """
    return _of_chosen(lambda num, wrong: max(1, num - wrong))


def num_wrong(outliers: float, num: int) -> int:
    """How many of ``num`` updates are left out as wrong: the share, rounded up, and always fewer than half."""
    return max(0, min(math.ceil(outliers * num - 1e-9), (num - 1) // 2))


def _of_elements(reduce: Reduce) -> Strategy:
    def choose(gathered: Gathered) -> Arrays:
        new: Arrays = {name: np.array(value, np.float32) for name, value in gathered.reference.items()}
        num = sum(1 for _ in gathered.updates())
        for pieces in _blocks(gathered.reference, num):
            for piece, rows in _rows(gathered, pieces):
                if rows:
                    reduced = reduce(np.stack(rows), gathered.outliers)
                    new[piece.name].reshape(-1)[piece.start : piece.stop] = reduced.astype(np.float32)
        return new

    return fedavg()._replace(add=_check, choose=choose)


def _of_chosen(count: Callable[[int, int], int]) -> Strategy:
    def choose(gathered: Gathered) -> Arrays:
        scores = _scores(gathered)
        best = sorted(scores, key=lambda device: (scores[device], device))
        wanted = set(best[: count(len(best), num_wrong(gathered.outliers, len(best)))])
        sums = init_sums(gathered.reference)
        for update in gathered.updates():
            if update.device_id in wanted:
                sums = add_to_sums(sums, update.values, 1)
        return {
            name: sums.mean(name, np.float32) if sums.weights[name] else value.copy()
            for name, value in gathered.reference.items()
        }

    return fedavg()._replace(add=_check, choose=choose)


def _trimmed_mean(values: Doubles, outliers: float) -> Doubles:
    num = len(values)
    wrong = num_wrong(outliers, num)
    kept = np.sort(values, axis=0)[wrong : num - wrong]
    return np.asarray(kept.sum(axis=0) / len(kept))


def _scores(gathered: Gathered) -> dict[str, float]:
    """Sum of the squared distances to the nearest others, by device."""
    devices = [update.device_id for update in gathered.updates()]
    num = len(devices)
    squares = np.zeros((num, num))
    for pieces in _blocks(gathered.reference, num):
        for i, j, square in _squares(gathered, pieces):
            squares[i, j] += square
            squares[j, i] += square
    nearest = max(1, num - num_wrong(gathered.outliers, num) - 2)
    scores = np.sort(squares, axis=1)[:, 1 : nearest + 1].sum(axis=1)  # the first is itself
    return dict(zip(devices, scores.tolist(), strict=True))


def _squares(gathered: Gathered, pieces: list[_Piece]) -> Iterator[tuple[int, int, float]]:
    rows = [np.concatenate([_moved(update, piece) for piece in pieces]) for update in gathered.updates()]
    for (i, one), (j, other) in combinations(enumerate(rows), 2):
        apart = one - other
        yield i, j, float(np.cumsum(apart * apart)[-1]) if apart.size else 0.0


def _rows(gathered: Gathered, pieces: list[_Piece]) -> Iterator[tuple[_Piece, list[Doubles]]]:
    """These pieces of all updates, each of those that hold its tensor."""
    rows: list[list[Doubles]] = [[] for _ in pieces]
    for update in gathered.updates():
        for piece, found in zip(pieces, rows, strict=True):
            if piece.name in update.values:
                found.append(_cut(update.values[piece.name], piece))
    return zip(pieces, rows, strict=True)


def _moved(update: Update, piece: _Piece) -> Doubles:
    if piece.name not in update.values:
        return np.zeros(piece.stop - piece.start)
    return _cut(update.values[piece.name], piece) - _cut(started(update, piece.name), piece)


def _cut(value: Array, piece: _Piece) -> Doubles:
    return np.array(value, np.float64).reshape(-1)[piece.start : piece.stop]


def _blocks(reference: Arrays, num: int) -> Iterator[list[_Piece]]:
    """Pieces of all tensors, together of at most BLOCK_BYTES a block, float64, over ``num`` devices."""
    limit = max(1, BLOCK_BYTES // (8 * max(1, num)))
    block: list[_Piece] = []
    room = limit
    for name, value in sorted(reference.items()):
        start = 0
        while start < value.size:
            stop = min(value.size, start + room)
            block.append(_Piece(name, start, stop))
            room -= stop - start
            start = stop
            if not room:
                yield block
                block, room = [], limit
    if block:
        yield block


def _check(sums: Sums, update: Update) -> Sums:
    """Look whether an update is plausible; what is made of all of them is made at the closing."""
    check_values(sums, update.values, update.weight)
    return sums
