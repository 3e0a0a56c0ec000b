"""Weights of classes in the loss, as ``torch.nn.CrossEntropyLoss(weight=…)`` has them: a mean weighted by each label's class.

Shapes: C classes.
"""

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Floats, Indices
from fleetune.device_runtime.contracts.class_weights import is_balanced, named_weights
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data.samples import Dataset


def read_class_weights(given: str, manifest: Manifest, dataset: Dataset) -> Floats | None:
    """Make the weights of the classes, float32 (C,); None where ``given`` is empty.

    Args:
        given: as :func:`named_weights` takes it; ``balanced`` is N / (classes there are x samples of the class), as
            scikit-learn has it.
        manifest: of the artifact, which names the classes.
        dataset: the labelled samples that train; a class without any has weight 1, which nothing uses.

    Raises:
        ConfigError: as :func:`named_weights`.
    """
    named = named_weights(given, manifest)
    return _balanced(dataset, len(manifest.labels)) if is_balanced(given) else named


def _balanced(dataset: Dataset, num_classes: int) -> Floats:
    """Source: compute_class_weight("balanced") of scikit-learn."""
    labels: Indices = dataset.columns[dataset.label_name].values.astype(np.int64).ravel()
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    there = int((counts > 0).sum())
    weights: NDArray[np.float64] = np.divide(
        counts.sum(), there * counts, out=np.ones(num_classes), where=counts > 0
    )
    return weights.astype(np.float32)
