"""The attack of an aggregator that reads texts out of a device's updates, against a real engine under a real contract.

The first layer's inputs are the sums of token and position that every copy of the base model holds, normed. The rows of the
gradient of a LoRA's A in that layer are combinations of them. So the aggregator offers bait (A of zeros there, all else random),
puts the rows of many answers together, and lists the pairs of token and place that lie in their span.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.arrays import Arrays, load_arrays
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.lora import pairs_of
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.samples import Dataset, Ragged
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.terms.contract import Contract
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.training.machine import Machine

Doubles = NDArray[np.float64]
Line = tuple[int, ...]
"""Tokens of a text in order; ``(token, place)`` are its pairs."""
SGD = OptimizerSpec(name="sgd", lr=1.0)
SEQ_LEN = 32
_SOFTNESS = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
"""Share of the largest singular value below which a direction is taken for noise: the attacker's best is counted."""
_EMBEDDINGS = (
    "word_embeddings.weight",
    "position_embeddings.weight",
    "token_type_embeddings.weight",
    "LayerNorm.weight",
    "LayerNorm.bias",
)
_SEEDS = 2000
_SILENT, _STEEP = 1e-4, 200.0


class Device:
    """One that trains on its own lines and answers offers as a device does; ``refused`` counts those that it declined."""

    def __init__(self, machine: Machine, artifact: Path, data: Path, terms: Terms | None) -> None:
        """``terms`` None: without a contract."""
        self.artifact, self._machine = open_artifact(artifact), machine
        self.dataset = load_dataset(data, self.artifact.manifest, artifact, seq_len=SEQ_LEN)
        self._contract = terms and Contract(terms, facts=MemoryOutbox(), files=MemoryFiles())
        self.refused = self.asked = 0

    def answer(self, work: LocalWork, adapter: Arrays) -> Arrays | None:
        """The update to an offer, or None where it is declined."""
        self.asked += 1
        try:
            return self._trained(work, adapter)
        except ConfigError:
            self.refused += 1
            return None

    def _trained(self, work: LocalWork, adapter: Arrays) -> Arrays:
        contract, have = self._contract, self.dataset.num_samples
        dataset = self.dataset
        if contract:
            contract.check(work, role="train", key=str(self.asked), num_samples=have, names=adapter)
            contract.begin(str(self.asked))
            dataset = dataset.subset(np.arange(contract.num_used(work, have)))
        training = self._machine.trainer(dataset, work, {n: a.copy() for n, a in adapter.items()})
        while not training.done:
            training.step()
        if not contract:
            return training.adapter
        contract.check_effective(training.effective_samples)
        return contract.outgoing(training.adapter, adapter).values


class Attacker:
    """Knows the artifact and a list of words, and makes bait."""

    def __init__(self, artifact: Path, words: Sequence[Line], *, seed: int = 0) -> None:
        """``words``: lines of people like the device's owner; every token of the device's is among them."""
        found = open_artifact(artifact)
        self._adapter = found.adapter()
        self._draws = np.random.default_rng(seed)
        self.lowest = [pair for pair in pairs_of(self._adapter) if ".layer.0." in pair.a]
        tokens = np.unique([token for line in words for token in line])
        places = max(map(len, words))
        base = load_arrays(artifact / "base.safetensors")
        self.pairs = [(int(token), place) for place in range(places) for token in tokens]
        self._inputs = np.concatenate([_inputs(base, tokens, place) for place in range(places)])

    def bait(self, *, lean: float = 0.1) -> Arrays:
        """An adapter whose first A's are zeros, and the rest random; ``lean``: how hard the head judges."""
        found = {name: self._drawn(value, 0.3) for name, value in self._adapter.items()}
        for pair in self.lowest:
            found[pair.a], found[pair.b] = np.zeros_like(found[pair.a]), self._drawn(found[pair.b], 1.0)
        weight, bias = self._head_of(found)
        return {**found, weight: self._drawn(found[weight], lean), bias: np.zeros_like(found[bias])}

    def hook(self, label: int, features: Callable[[Arrays], Doubles], *, share: float) -> Arrays:
        """Bait to which the samples answer whose features go the farthest in a direction drawn anew, about a ``share`` of them.

        Args:
            label: one that no sample of the device has.
            features: of the attacker's own texts with this adapter, (texts, width): where the bound lies is learned from them.
            share: of the samples.

        Source: feature fishing (Wen et al., arXiv 2202.00580); that the label is one nobody has is ours.
        """
        found = self.bait()
        weight, bias = self._head_of(found)
        direction = self._drawn(found[weight][label], 1.0)
        direction /= np.linalg.norm(direction)
        rows, biases = np.zeros_like(found[weight]), np.zeros_like(found[bias])
        rows[label] = _STEEP * direction
        biases[label] = -_STEEP * np.quantile(features(found) @ direction, 1 - share)
        return {**found, weight: rows, bias: biases}

    def hooked(self, label: int, bait: Arrays, features: Doubles) -> NDArray[np.int64]:
        """Which of the samples with these ``features`` answer to a hook."""
        weight, bias = self._head_of(bait)
        return np.flatnonzero(features @ bait[weight][label] + bait[bias][label] > 0)

    def rows(self, values: Arrays, bait: Arrays) -> Doubles:
        """What an update tells of the first layer's inputs, (2 rank, width)."""
        return np.concatenate(
            [np.subtract(values[p.a], bait[p.a], dtype=np.float64) for p in self.lowest if p.a in values]
        )

    def lists(self, rows: Doubles, *, most: int) -> Iterator[set[tuple[int, int]]]:
        """The ``most`` pairs that lie in the span of ``rows`` the nearest, for each softness."""
        size = np.linalg.norm(rows, axis=1)
        rows = rows[size > _SILENT * size.max()]
        _, sizes, directions = np.linalg.svd(
            rows / np.linalg.norm(rows, axis=1, keepdims=True), full_matrices=False
        )
        along = np.square(self._inputs @ directions.T)
        for softness in _SOFTNESS:
            inside = along @ (sizes**2 / (sizes**2 + (softness * sizes[0]) ** 2))
            yield {self.pairs[i] for i in np.argpartition(-inside, most)[:most]}

    def read(self, rows: Doubles, lines: Sequence[Line]) -> set[Line]:
        """Those of ``lines`` of which every token is listed at its place, on a list as long as the truth.

        Where more than half of the list is false nothing is read. The length and the best softness are given to the attacker.
        """
        if not len(rows) or not lines or not np.abs(rows).max() > 0:
            return set()
        truth = {pair for line in lines for pair in _pairs(line)}
        good = [
            listed for listed in self.lists(rows, most=len(truth)) if 2 * len(listed & truth) > len(truth)
        ]
        return max(
            ({line for line in lines if {*_pairs(line)} <= listed} for listed in good), key=len, default=set()
        )

    def _drawn(self, like: NDArray[np.generic], scale: float) -> NDArray[np.float32]:
        return self._draws.normal(0, scale, like.shape).astype(np.float32)

    def _head_of(self, adapter: Arrays) -> tuple[str, str]:
        return next(n for n in adapter if n.endswith("classifier.weight")), next(
            n for n in adapter if n.endswith("classifier.bias")
        )


def lines_of(dataset: Dataset) -> list[Line]:
    """The texts of a data set, as tokens."""
    column = dataset.columns["input_ids"]
    assert isinstance(column, Ragged)
    ends = np.cumsum(column.lengths)
    return [
        tuple(int(t) for t in column.values[end - n : end])
        for end, n in zip(ends, column.lengths, strict=True)
    ]


def noisy(values: Arrays, bait: Arrays, share: float) -> Arrays:
    """An update with Gaussian noise of ``share`` times the root mean square of each tensor's change."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))

    def one(name: str) -> NDArray[np.float64]:
        change = np.subtract(values[name], bait[name], dtype=np.float64)
        return values[name] + rng.normal(0, 1, change.shape) * share * np.sqrt(np.square(change).mean())

    return {name: one(name) for name in values}


def seeds_for(
    dataset: Dataset, batch: int, steps: int = 1, *, last: bool = False
) -> Iterator[tuple[int, list[int]]]:
    """Seeds whose first ``steps`` batches hold every row between them, with the rows of each; ``last``: of the last batch alone.

    An aggregator that asks often has them all.
    """
    left, seed = {*range(dataset.num_samples)}, -1
    while left:
        seed += 1
        batches = dataset.epoch_batches(seed, 0, batch)[:steps]
        rows = sorted(int(i) for one in batches[-1 if last else 0 :] for i in one)
        if 2 * len(left & {*rows}) >= min(len(left), len(rows)) or (seed > _SEEDS and left & {*rows}):
            left -= {*rows}
            yield seed, rows


def _pairs(line: Line) -> Iterator[tuple[int, int]]:
    return ((token, place) for place, token in enumerate(line))


def _inputs(base: Arrays, tokens: NDArray[np.int64], place: int) -> Doubles:
    """What flows into the first layer where a token stands at a place, unit length, (tokens, width)."""
    words, places, kinds, scale, shift = (
        next(a for n, a in base.items() if n.endswith(f"embeddings.{end}")).astype(np.float64)
        for end in _EMBEDDINGS
    )
    x = words[tokens] + places[place] + kinds[0]
    x = (x - x.mean(1, keepdims=True)) / np.sqrt(x.var(1, keepdims=True) + 1e-12)
    x = x * scale + shift
    return np.asarray(x / np.linalg.norm(x, axis=1, keepdims=True))
