"""Class means as they travel: sums over a device's samples, by class, of what the model's last linear sees.

Shapes: C classes, D width of the features. Source: FedNCM, arXiv 2306.03937, section 3; the sums of squared norms are ours.
"""

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.manifest import Manifest, Tensor
from fleetune.device_runtime.contracts.short_floats import shortened
from fleetune.device_runtime.errors import ConfigError

SUMS, COUNTS, SQUARES = "class_means.sums", "class_means.counts", "class_means.squares"
"""Of features (C, D), of samples (C,), and of the features' squared norms (C,)."""

_TASKS = ("sequence-classification", "image-classification", "audio-classification")


class ClassHead(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The trainable linear that ends a classifier, ``logits = features @ weight.T + bias``, by its tensors' names."""

    weight: str = ""
    """(C, D)"""
    bias: str = ""
    """(C,); empty where it has none."""


def class_head(manifest: Manifest) -> ClassHead:
    """Find the linear that ends a classifier; whether the logits are affine in it ``training.class_means`` proves.

    Raises:
        ConfigError: a model of another task or problem type, or without a trainable tensor (classes, width) in its head.
    """
    if manifest.task not in _TASKS:
        raise ConfigError(
            f"a class-mean head is of {' or '.join(_TASKS)}; this model's task is {manifest.task}"
        )
    if manifest.problem_type:
        raise ConfigError(
            f"a class-mean head needs one class a row; this model's problem type is {manifest.problem_type}"
        )
    tensors = [manifest.tensors[i] for i in manifest.head.tensors]
    classes = len(manifest.labels)
    found = [t for t in tensors if t.trainable and len(t.shape) == 2 and t.shape[0] == classes]
    if not found or "predict" not in manifest.head.graphs:
        raise ConfigError(
            f"a class-mean head takes the place of a trainable linear of {classes} classes; this head has none"
        )
    weight = found[-1]
    return ClassHead(weight.name, next((t.name for t in tensors if _is_bias(t, weight)), ""))


def blank_sums(num_classes: int, width: int) -> Arrays:
    """Sums of nothing, float32: the reference of an update that carries class means."""
    return {
        SUMS: np.zeros((num_classes, width), np.float32),
        COUNTS: np.zeros(num_classes, np.float32),
        SQUARES: np.zeros(num_classes, np.float32),
    }


def shortened_sums(sums: Arrays, bits: int) -> Arrays:
    """Round the sums of features to so many bits of significand, 0 for as they are; the counts stay.

    Squares rise to what rounded sums need, so that they stay what samples can have: |sum|^2 <= count * squares.
    """
    if not bits:
        return sums
    totals = np.asarray(sums[SUMS], np.float32)
    rounded = shortened(totals, np.zeros_like(totals), bits)
    least = np.square(rounded, dtype=np.float64).sum(1) / np.maximum(sums[COUNTS], 1)
    return {**sums, SUMS: rounded, SQUARES: np.maximum(sums[SQUARES], least)}


def _is_bias(tensor: Tensor, weight: Tensor) -> bool:
    named = f"{weight.name.rpartition('.')[0]}.bias"
    return tensor.trainable and tensor.name == named and tensor.shape == weight.shape[:1]
