"""A part of a device's own samples that never trains: what a round's work has gained is measured on it. Ours.

DropPEFT's configurator learns from the accuracy gained per time; of twenty rows that is too coarse, so the loss is measured too.
"""

from math import isfinite
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.draws import Key, permutation
from fleetune.device_runtime.training.evaluation import Evaluation

ROWS_MAX = 64
"""No more rows are held out: measuring them twice a round must stay cheap."""
_ROWS_FREE, _ROWS_TRAINED_EACH = 16, 16
"""So many rows are measured anyway; more of them only as one to so many that the run trains on."""
_SEED_DIGITS = 13


class Split(NamedTuple):
    """A data set in two; ``kept`` int64 (training.num_samples,) are the places of the training rows in the whole."""

    training: Dataset
    held: Dataset | None
    kept: Indices


def split(dataset: Dataset, share: float) -> Split:
    """Hold back a share of the rows, at least 1, at most half and ROWS_MAX: the same ones wherever the data is the same.

    None are held out of fewer than two rows, or of rows that all have one label: nothing could be learned from them.
    """
    count = _num_held(dataset, share)
    places = np.arange(dataset.num_samples)
    if not count:
        return Split(dataset, None, places)
    seed = int(dataset.digest[:_SEED_DIGITS], 16)
    held = np.sort(permutation(Key(seed, "held-out", 0), dataset.num_samples)[:count])
    kept = np.delete(places, held)
    return Split(dataset.subset(kept), dataset.subset(held), kept)


def measured(held: Dataset, *, num_trained: int) -> Dataset:
    """The held-out rows that a run which trains on ``num_trained`` rows, repetitions counted, measures: the first few."""
    count = max(_ROWS_FREE, num_trained // _ROWS_TRAINED_EACH)
    return held if count >= held.num_samples else held.subset(np.arange(count))


def measured_rows(parts: Split, work: LocalWork) -> Dataset | None:
    """The held-out rows that a run of ``work`` measures; None if nothing is held out."""
    num_trained = parts.training.num_steps(work) * work.batch_size
    return parts.held and measured(parts.held, num_trained=num_trained)


def figures(when: str, found: Evaluation) -> dict[str, float]:
    """An evaluation as statistics of a run, ``when`` being before or after it; none if the loss is not finite."""
    if not isfinite(found.loss):
        return {}
    return {
        f"held_loss_{when}": found.loss,
        f"held_accuracy_{when}": found.accuracy,
        "held_samples": float(found.num_samples),
    }


def _num_held(dataset: Dataset, share: float) -> int:
    if not share or dataset.num_samples < 2 or dataset.has_one_label:
        return 0
    return min(max(1, round(share * dataset.num_samples)), dataset.num_samples // 2, ROWS_MAX)
