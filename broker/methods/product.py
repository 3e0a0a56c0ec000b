"""Product averaging: the mean of the devices' B A, exact, and the best factors of the artifact's rank for it.

The mean of products is not the product of means: what FedIT makes of A and B apart is not what the devices learned on
average. FlexLoRA (Bai et al., arXiv 2402.11505) averages the products and takes an SVD. So it is here, with exact sums; what
of the mean has no place in the rank is lost. FedEx-LoRA (Singhal et al., arXiv 2410.09432) adds that to the frozen weights:
not here, where every device holds them as they are in the artifact. FLoRA (Wang et al., arXiv 2409.05976) stacks the factors:
not here, where graphs have one rank.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import Strategy, Update, add_to_sums, init_sums
from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.contracts.lora import Pair, cut, pairs_of, place_of, rank_of
from fleetune.device_runtime.errors import WireError

Doubles = NDArray[np.float64]
_DENSE = "{0.b} @ {0.a}"
"""Name of a module's sum; no tensor has one with blanks."""
_BLURRED = 1e-7
"""Singular values below this share of the largest are noise where they are roots of eigenvalues."""


def product() -> Strategy:
    """Mean of B A by samples for each module over the updates that hold a part of it, cut to the rank; all else as ``fedavg``.

    An update of fewer components counts with its whole product. B becomes U S and A becomes V of the SVD, the largest entry of
    each row of A positive. Rows of A have length 1, about that of fresh ones, and a component that is worth nothing still learns,
    which it never would if half of S were on either side. The best components come first: they are what lower ranks get.

    Memory: three int64 at most for each of out x in elements of every module with a LoRA, whatever the number of devices. Sums
    are the same bits in any order of arrival and on any machine; factors, by LAPACK, on one machine.
    """

    def init(reference: Arrays) -> Sums:
        pairs = pairs_of(reference)
        dense = {_DENSE.format(pair): np.empty(_shape(pair, reference), np.float32) for pair in pairs}
        return init_sums({**_others(reference, pairs), **dense})

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        new = {name: value.copy() for name, value in reference.items()}
        for name in reference.keys() & sums.weights.keys():
            if sums.weights[name]:
                new[name] = sums.mean(name, np.float32)
        for pair in pairs_of(reference):
            if sums.weights[_DENSE.format(pair)]:
                new[pair.a], new[pair.b] = _factors(sums.mean(_DENSE.format(pair)), pair, reference)
        return new, state

    return Strategy(init, _add, finish)


def multiplied(b: Array, a: Array) -> Doubles:
    """Multiply B (out, r, …) by A (r, in, …) to float64 (out, in), one component after another: the same bits on any machine."""
    columns, rows = _matrix(b).T, _matrix(a)
    total = np.zeros((columns.shape[1], rows.shape[1]))
    for column, row in zip(columns, rows, strict=True):
        total += column[:, None] * row
    return total


def factors(dense: Doubles, rank: int) -> tuple[Doubles, Doubles]:
    """Best B (out, rank) and A (rank, in) for a matrix (out, in) in the Frobenius norm; the rows of A are orthonormal."""
    u, s, v = _decomposed(dense)
    count = min(rank, len(s))
    a, b = np.zeros((rank, dense.shape[1])), np.zeros((dense.shape[0], rank))
    largest = np.abs(v[:count]).argmax(axis=1)
    signs = np.where(v[np.arange(count), largest] < 0, -1.0, 1.0)
    a[:count], b[:, :count] = v[:count] * signs[:, None], u[:, :count] * (s[:count] * signs)
    return b, a


def _decomposed(dense: Doubles) -> tuple[Doubles, Doubles, Doubles]:
    """U, S and V of the SVD; by the eigenvectors of M^T M where LAPACK's does not converge, which was seen."""
    try:
        return np.linalg.svd(dense, full_matrices=False)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(dense.T @ dense)
        v = vectors[:, ::-1].T[: min(dense.shape)]
        s = np.sqrt(np.maximum(values[::-1][: len(v)], 0.0))
        return dense @ v.T / np.where(s > s[0] * _BLURRED, s, np.inf), s, v


def _add(sums: Sums, update: Update) -> Sums:
    pairs = pairs_of(update.reference)
    values = {**_others(update.values, pairs), **dict(_products(update, pairs))}
    return add_to_sums(sums, values, update.weight)


def _products(update: Update, pairs: tuple[Pair, ...]) -> Iterator[tuple[str, Doubles]]:
    """Products of the pairs that an update holds a part of; the other tensor of a pair is as it was."""
    for pair in pairs:
        if rank := rank_of(pair, update.values):
            whole = {n: update.reference[n] for n in pair}
            held = _filled(whole, update) if pair.a in update.rows else {**cut(whole, rank), **update.values}
            if held[pair.b].shape[1] != held[pair.a].shape[0]:
                raise WireError(f"implausible update: {pair.a} and {pair.b} have not as many components")
            yield _DENSE.format(pair), multiplied(held[pair.b], held[pair.a])


def _filled(whole: Arrays, update: Update) -> dict[str, NDArray[Any]]:
    """A pair with what an update holds in its place, all other components as the device had them: as in its reference."""
    found: dict[str, NDArray[Any]] = {name: np.array(value, np.float64) for name, value in whole.items()}
    for name in whole.keys() & update.values.keys():
        place = found[name][at := place_of(name, update.rows[name])]
        if place.shape != update.values[name].shape:
            raise WireError(f"implausible update: {name} is not of {len(update.rows[name])} components")
        found[name][at] = update.values[name]
    return found


def _factors(dense: Doubles, pair: Pair, reference: Arrays) -> tuple[Array, Array]:
    found = factors(dense, rank_of(pair, reference))
    b, a = (
        value.reshape(reference[name].shape).astype(np.float32)
        for value, name in zip(found, (pair.b, pair.a), strict=True)
    )
    return a, b


def _others(values: Mapping[str, NDArray[Any]], pairs: tuple[Pair, ...]) -> dict[str, NDArray[Any]]:
    paired = {name for pair in pairs for name in pair}
    return {name: value for name, value in values.items() if name not in paired}


def _shape(pair: Pair, reference: Mapping[str, Array]) -> tuple[int, int]:
    return len(reference[pair.b]), _matrix(reference[pair.a]).shape[1]


def _matrix(value: Array) -> Doubles:
    """All but the first axis as one: a convolution's A is (r, in, height, width), its B (out, r, 1, 1)."""
    return np.asarray(value, np.float64).reshape(len(value), -1)
