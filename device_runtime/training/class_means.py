"""One forward pass over a data set for the class means of what the model's last linear sees: nothing is trained."""

from collections.abc import Callable

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS, ClassHead, class_head
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.hidden_cache import OpenRows
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.errors import ConfigError

_AFFINE_WITHIN = 1e-4
"""Of the largest logit."""


def class_sums(
    engine: Engine,
    dataset: Dataset,
    adapter: Arrays,
    *,
    batch_size: int = 32,
    memory: MemoryPlan | None = None,
    before_batch: Callable[[], object] = lambda: None,
    hidden: Callable[[Indices], OpenRows] | None = None,
    cache_below: int = 0,
) -> Arrays:
    """Sum features, samples and squared norms by class, at full depth.

    Samples without a class are left out. Batches are made by length, so that the order of the samples hardly matters: sums of the
    same samples in another order, or of parts of them, agree within 1e-5 of the largest.

    Args:
        engine: an opened artifact.
        dataset: labelled samples.
        adapter: every trainable tensor by name, float32, and thresholds that prune it; its last linear has no say.
        batch_size: samples at a time; beside them C (D + 2) numbers are held.
        memory: how they are held; None for the engine's own way.
        before_batch: called before each batch; may wait.
        hidden: samples -> where what flows into layer ``cache_below`` is kept of them; None to keep nothing.
        cache_below: the layer.

    Returns:
        float64: ``SUMS`` (C, D), ``COUNTS`` (C,) and ``SQUARES`` (C,).

    Raises:
        ConfigError: the model does not end in a linear of its classes, or a feature is not finite.
    """
    manifest = engine.artifact.manifest
    head = class_head(manifest)
    num_classes, width = adapter[head.weight].shape
    sums, counts, squares = np.zeros((num_classes, width)), np.zeros(num_classes), np.zeros(num_classes)
    rows = engine.rows(min(batch_size, dataset.num_samples), dataset.mean_tokens, memory)
    for i, indices in enumerate(dataset.ordered_batches(batch_size)):
        before_batch()
        batch = dataset.rows(indices)
        kept = hidden(indices) if hidden and cache_below > 0 else None
        features = engine.features(batch, adapter, rows=rows, hidden=kept, cache_below=cache_below)  # (B, D)
        if i == 0:
            _check_affine(engine, head, batch, adapter, features=features, rows=rows)
        if not np.isfinite(features).all():
            raise ConfigError(
                "a feature is not finite: there is NaN in the model's weights, or they overflow"
            )
        labels = batch[manifest.label_name]
        is_of = (labels[:, None] == np.arange(num_classes)).astype(np.float64)  # (B, C)
        exact = features.astype(np.float64)
        sums += is_of.T @ exact
        counts += is_of.sum(0)
        squares += is_of.T @ np.square(exact).sum(1)
    return {SUMS: sums, COUNTS: counts, SQUARES: squares}


def _check_affine(
    engine: Engine, head: ClassHead, batch: Arrays, adapter: Arrays, *, features: Array, rows: Rows
) -> None:
    """Hold the features to what they are for: with any other linear for a head they give its logits."""
    probe = _probe(head, adapter)
    found = np.asarray(engine.predict(batch, {**adapter, **probe}, rows=rows), np.float64)
    wanted = np.asarray(features, np.float64) @ np.asarray(probe[head.weight], np.float64).T
    wanted += np.asarray(probe.get(head.bias, 0), np.float64)
    if not np.abs(found - wanted).max() <= _AFFINE_WITHIN * max(1.0, float(np.abs(found).max())):
        raise ConfigError(f"this head is not linear in {head.weight}: it cannot begin with class means")


def _probe(head: ClassHead, adapter: Arrays) -> Arrays:
    """A linear in which no two rows, and no two columns, are alike."""
    names = [name for name in (head.weight, head.bias) if name]
    return {
        n: np.sin(np.arange(1, adapter[n].size + 1)).reshape(adapter[n].shape).astype(np.float32)
        for n in names
    }
