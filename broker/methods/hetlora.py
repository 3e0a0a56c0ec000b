"""Strategies for devices that train different ranks: each component of a LoRA is averaged over the devices that hold it.

HetLoRA (Cho, Liu, Xu, Fahrezi and Joshi, arXiv 2401.06432) truncates the version to each device's rank, fills up with zeros
what comes back, and weighs it by the Frobenius norm of B A: who learned more counts for more. Ours: no zeros are counted, so
that a component that few hold is not shrunk by those who do not; the weight is that norm, by module, times the samples. Its
pruning of a device's rank is left out: the operator or a configurator says the rank (``LocalWork.rank``).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import (
    Strategy,
    Update,
    add_to_sums,
    check_values,
    init_sums,
)
from fleetune.device_runtime.arrays import Arrays, Indices
from fleetune.device_runtime.contracts.lora import Pair, cut, pairs_of, place_of, rank_of
from fleetune.device_runtime.errors import WireError

Parts = dict[str, NDArray[Any]]
Weigh = Callable[[Pair, Update], float]
"""(pair, update that holds a part of it) -> what its components count for beside the samples, above 0 and at most 1"""
_NORM_MIN, _NORM_MAX = 2.0**-20, 2.0**20
"""Norms of B A are held between these, and counted in units of the largest: no product with one is beyond what sums can hold."""


def hetlora() -> Strategy:
    """Mean of each component by samples and by the norm of its update's B A; what is in no pair as ``fedavg``.

    Source: HetLoRA, arXiv 2401.06432; what differs is said above.
    """
    return _by_component(_norm)


def rank_mean() -> Strategy:
    """Mean of each component by samples, over the updates that hold it. As RBLA has it, arXiv 2408.08699."""
    return _by_component(lambda pair, update: 1.0)


def _by_component(weigh: Weigh) -> Strategy:
    def init(reference: Arrays) -> Sums:
        split = _split(reference, pairs_of(reference))
        weights = {_weight_of(key): np.zeros((), np.float32) for key in split if key not in reference}
        return init_sums({**split, **weights})

    def add(sums: Sums, update: Update) -> Sums:
        pairs = pairs_of(update.reference)
        split = _split(update.values, pairs, update.rows)
        check_values(sums, split, update.weight)
        for pair in pairs:
            if rank_of(pair, update.values):
                split |= _weighted(pair, split, weigh(pair, update))
        return add_to_sums(sums, split, update.weight)

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        new = {name: value.copy() for name, value in reference.items()}
        for key, place in _split(new, pairs_of(new)).items():
            if sums.weights[key]:
                share = sums.mean(_weight_of(key)) if key not in reference else 1.0
                place[...] = sums.mean(key) / share
        return new, state

    return Strategy(init, add, finish)


def _split(
    values: Mapping[str, NDArray[Any]], pairs: tuple[Pair, ...], rows: Mapping[str, Indices] | None = None
) -> Parts:
    """Views of the components of each pair, by tensor and number, and all other tensors by name; ``rows`` as of an Update."""
    found = dict(values)
    for pair in pairs:
        a, b = found.pop(pair.a, None), found.pop(pair.b, None)
        for name, parts in ((pair.a, a), (pair.b, None if b is None else b.swapaxes(0, 1))):
            if parts is not None:
                found |= _numbered(name, parts, (rows or {}).get(name))
    return found


def _numbered(name: str, parts: NDArray[Any], rows: Indices | None) -> Parts:
    """Components by key; WireError if there are not as many as ``rows``."""
    numbers = range(len(parts)) if rows is None else rows.tolist()
    if len(numbers) != len(parts):
        raise WireError(f"implausible update: {name} has {len(parts)} components, expected {len(numbers)}")
    return {_key(name, j): part for j, part in zip(numbers, parts, strict=True)}


def _weighted(pair: Pair, split: Parts, weight: float) -> Parts:
    """Components of a pair times its weight, and that weight beside each."""
    starts = tuple(f"{name} " for name in pair)
    mine = {key: value for key, value in split.items() if key.startswith(starts)}
    return {
        **{key: np.multiply(value, weight, dtype=np.float64) for key, value in mine.items()},
        **{_weight_of(key): np.array(weight) for key in mine},
    }


def _norm(pair: Pair, update: Update) -> float:
    """Frobenius norm of B A, by r x r products; a tensor of the pair that did not change is the reference's."""
    held = {**_as_sent(pair, update), **update.values}
    a = np.asarray(held[pair.a], np.float64).reshape(len(held[pair.a]), -1)
    b = np.asarray(held[pair.b], np.float64).reshape(len(held[pair.b]), -1)
    square = float(np.sum((b.T @ b) * (a @ a.T)))
    return min(max(math.sqrt(max(square, 0.0)), _NORM_MIN), _NORM_MAX) / _NORM_MAX


def _as_sent(pair: Pair, update: Update) -> Parts:
    """The components of the reference that an update holds of a pair."""
    whole = {name: update.reference[name] for name in pair}
    if pair.a in update.rows:
        return {name: value[place_of(name, update.rows[name])] for name, value in whole.items()}
    return {**cut(whole, rank_of(pair, update.values))}


def _key(name: str, component: int) -> str:
    """Name of a component; no tensor has one with blanks."""
    return f"{name} {component}"


def _weight_of(key: str) -> str:
    return f"{key} weight"
