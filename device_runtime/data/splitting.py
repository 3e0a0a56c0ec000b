"""Data in two: a part that trains, and one that a run is measured on. Ours: each class gives its share."""

import math
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import DataError


class Parts(NamedTuple):
    """A data set in two, rows in their order."""

    training: Dataset
    held: Dataset


def split_off(dataset: Dataset, share: float, *, seed: int, source: str) -> Parts:
    """Hold out a share of the rows: of each class alike where every row has one, the same ones for a seed.

    Args:
        dataset: labelled samples.
        share: above 0, below 1; of n rows of a class floor(share n + 1/2), at most n - 1.
        seed: of the draw.
        source: the file, for messages.

    Raises:
        DataError: rows of one class alone, or a share that holds out none, or one class alone.
    """
    labels = dataset.labels
    classes = np.unique(labels)
    if dataset.has_one_label:
        what = "are of one class" if len(labels) else "have the same label"
        raise DataError(
            f"{source}: all {dataset.num_samples} samples {what}: add samples of another, or leave the split away"
        )
    draws = Draws(seed, "eval-split", 0)
    groups = [np.flatnonzero(labels == label) for label in classes] or [np.arange(dataset.num_samples)]
    held = np.sort(np.concatenate([_held(group, share, draws) for group in groups]))
    if not len(held) or dataset.subset(held).has_one_label:
        of_one = "samples of one class alone" if len(labels) else "samples of one label alone"
        what = of_one if len(held) else "no sample"
        raise DataError(
            f"{source}: an evaluation split of {share:g} holds out {what}; raise it, bring more than {dataset.num_samples} "
            "samples, or give --eval"
        )
    kept = np.delete(np.arange(dataset.num_samples), held)
    return Parts(dataset.subset(kept), dataset.subset(held))


def _held(group: Indices, share: float, draws: Draws) -> Indices:
    count = min(math.floor(share * len(group) + 0.5), len(group) - 1)
    return group[draws.permutation(len(group))[:count]]
