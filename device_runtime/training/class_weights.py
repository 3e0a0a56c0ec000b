"""Weights of classes in the loss, as ``torch.nn.CrossEntropyLoss(weight=…)`` has them: a mean weighted by each label's class.

Shapes: C classes.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Floats, Indices
from fleetune.device_runtime.contracts.manifest import Manifest, Targets
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.errors import ConfigError, some

BALANCED = "balanced"
_WEIGHT_MAX = 1e6
_FLAG = "--class-weights"


def read_class_weights(given: str, manifest: Manifest, dataset: Dataset) -> Floats | None:
    """Make the weights of the classes, float32 (C,); None where ``given`` is empty.

    Args:
        given: ``a=2,b=1`` by name, 1 for a class that is not named; or ``balanced``, N / (classes there are x samples of the
            class), as scikit-learn has it.
        manifest: of the artifact, which names the classes.
        dataset: the labelled samples that train; a class without any has weight 1, which nothing uses.

    Raises:
        ConfigError: no such class, a weight that is no number above 0, or a model without classes.
    """
    if not given:
        return None
    _check_model(manifest)
    if given.strip() == BALANCED:
        return _balanced(dataset, len(manifest.labels))
    found = dict(_named(given, manifest.labels))
    return np.array([found.get(name, 1.0) for name in manifest.labels], np.float32)


def _check_model(manifest: Manifest) -> None:
    if manifest.backend == "ort-training":
        raise ConfigError(
            f"{_FLAG}: the models of ort-training are whole, and their loss weighs all classes alike"
        )
    if not manifest.labels or manifest.problem_type:
        what = manifest.problem_type or manifest.task
        raise ConfigError(f"{_FLAG} needs one class for each label; this model is for {what}")
    counted = manifest.counted
    if not isinstance(counted, Targets) or counted.shift or manifest.head.targets:
        raise ConfigError(f"{_FLAG}: this artifact's loss is no mean over labels of classes")


def _named(given: str, names: Sequence[str]) -> Iterator[tuple[str, float]]:
    seen: set[str] = set()
    for part in given.split(","):
        name, is_there, value = part.strip().rpartition("=")
        if not is_there or not name.strip():
            raise ConfigError(f"{_FLAG} {given!r}: expected {BALANCED}, or names with weights, as a=2,b=1")
        name = name.strip()
        if name not in names:
            raise ConfigError(f"{_FLAG}: no label {name!r}; have: {some(names, at_most=10)}")
        if name in seen:
            raise ConfigError(f"{_FLAG}: label {name!r} is there twice")
        seen.add(name)
        yield name, _weight(name, value)


def _weight(name: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        found = math.nan
    if not 0 < found <= _WEIGHT_MAX:
        raise ConfigError(
            f"{_FLAG}: {name}={value.strip()}: expected a number above 0, at most {_WEIGHT_MAX:g}"
        )
    return found


def _balanced(dataset: Dataset, num_classes: int) -> Floats:
    """Source: compute_class_weight("balanced") of scikit-learn."""
    labels: Indices = dataset.columns[dataset.label_name].values.astype(np.int64).ravel()
    counts = np.bincount(labels[labels >= 0], minlength=num_classes)
    there = int((counts > 0).sum())
    weights: NDArray[np.float64] = np.divide(
        counts.sum(), there * counts, out=np.ones(num_classes), where=counts > 0
    )
    return weights.astype(np.float32)
