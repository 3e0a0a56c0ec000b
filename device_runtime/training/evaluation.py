"""How good an adapter is on labelled samples, at full depth."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Arrays, Indices
from fleetune.device_runtime.contracts.manifest import Targets
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.thresholds import pruned
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.batches import share_of
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.token_head import shifted


class Evaluation(NamedTuple):
    """Mean loss and share of right answers over the labels that count, however batched; ``num_samples`` rows."""

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
    on_answers: Callable[[Indices, Indices], object] = lambda answers, labels: None,
) -> Evaluation:
    """Measure an adapter.

    Args:
        engine: an opened artifact.
        dataset: labelled samples; a causal language model is asked for each next token.
        adapter: every trainable tensor by name, float32; thresholds beside them prune it.
        batch_size: samples at a time.
        memory: how they are held; None for the engine's own way.
        before_batch: called before each batch; may wait.
        on_answers: called with each batch's answers and labels, int64 (N,) each: of those labels that count.
    """
    manifest, adapter = engine.artifact.manifest, pruned(adapter)
    rows = engine.rows(min(batch_size, dataset.num_samples), dataset.mean_tokens, memory)
    loss, shares, num_right, num_judged = 0.0, 0, 0, 0
    for indices in dataset.ordered_batches(batch_size):
        before_batch()
        batch = dataset.rows(indices)
        batch_loss, answers = engine.evaluate(batch, adapter, rows=rows)
        labels = batch[manifest.label_name].astype(np.int64)
        share = share_of(labels, manifest.counted)
        answered, wanted = _judged(answers, labels, manifest.counted)
        on_answers(answered, wanted)
        loss, shares = loss + batch_loss * share, shares + share
        num_right, num_judged = num_right + int((answered == wanted).sum()), num_judged + wanted.size
    return Evaluation(loss / max(1, shares), num_right / max(1, num_judged), dataset.num_samples)


def _judged(answers: Indices, labels: Indices, counted: Targets | None) -> tuple[Indices, Indices]:
    """Answers and labels, both (batch, …), of the labels that count, (N,)."""
    if counted is None:
        return answers.ravel(), labels.ravel()
    targets = shifted(labels, counted)
    judged = targets != counted.ignored
    return answers[judged], targets[judged]
