"""How good an adapter is on labelled samples, at full depth."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.contracts.manifest import Manifest, Targets
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.thresholds import pruned
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.batches import share_of
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.token_head import shifted
from fleetune.device_runtime.training.label_sets import LabelSets
from fleetune.device_runtime.training.regression import Regression

OnAnswers = Callable[[Any, Any], object]
"""What is told of each batch's answers and labels."""


class Evaluation(NamedTuple):
    """Mean loss and score over the labels that count, however batched; ``num_samples`` rows.

    The score, from 0 to 1, is what travels as ``accuracy``: the share of right answers; of label sets that of the rows with all
    labels right; of a regression R2, not below 0.
    """

    loss: float
    accuracy: float
    num_samples: int


def evaluate(
    engine: Engine,
    dataset: Dataset,
    adapter: Arrays,
    *,
    batch_size: int = 32,
    memory: MemoryPlan | None = None,
    before_batch: Callable[[], object] = lambda: None,
    on_answers: OnAnswers = lambda answers, labels: None,
) -> Evaluation:
    """Measure an adapter.

    Args:
        engine: an opened artifact.
        dataset: labelled samples; a causal language model is asked for each next token.
        adapter: every trainable tensor by name, float32; thresholds beside them prune it.
        batch_size: samples at a time.
        memory: how they are held; None for the engine's own way.
        before_batch: called before each batch; may wait.
        on_answers: called with each batch's answers and labels: int64 (N,) each, of those labels that count; of a regression,
            or of label sets, logits (N, K) and labels as the data set has them.
    """
    manifest, adapter = engine.artifact.manifest, pruned(adapter)
    rows = engine.rows(min(batch_size, dataset.num_samples), dataset.mean_tokens, memory)
    loss, shares, tally = 0.0, 0, _tally_of(manifest)
    for indices in dataset.ordered_batches(batch_size):
        before_batch()
        batch = dataset.rows(indices)
        batch_loss, answers = engine.evaluate(batch, adapter, rows=rows)
        labels = batch[manifest.label_name]
        share = share_of(labels, manifest.counted)
        judged = (
            (answers, labels)
            if manifest.problem_type
            else _judged(answers, labels.astype(np.int64), manifest.counted)
        )
        on_answers(*judged)
        tally.add(*judged)
        loss, shares = loss + batch_loss * share, shares + share
    return Evaluation(loss / max(1, shares), tally.score, dataset.num_samples)


class _Tally(Protocol):
    def add(self, answers: Array, labels: Array) -> None:
        """Take in what ``on_answers`` is called with."""

    @property
    def score(self) -> float:
        """From 0 to 1, the higher the better."""


class _Right:
    """Right answers counted."""

    def __init__(self) -> None:
        self._right, self._judged = 0, 0

    def add(self, answers: Array, labels: Array) -> None:
        self._right, self._judged = self._right + int((answers == labels).sum()), self._judged + labels.size

    @property
    def score(self) -> float:
        return self._right / max(1, self._judged)


def _tally_of(manifest: Manifest) -> _Tally:
    if manifest.problem_type == "regression":
        return Regression(len(manifest.labels))
    return LabelSets(len(manifest.labels)) if manifest.problem_type else _Right()


def _judged(answers: Array, labels: Indices, counted: Targets | None) -> tuple[Array, Array]:
    """Answers and labels, both (batch, …), of the labels that count, (N,)."""
    if counted is None:
        return answers.ravel(), labels.ravel()
    targets = shifted(labels, counted)
    judged = targets != counted.ignored
    return answers[judged], targets[judged]
