"""Weights of classes as a person writes them: ``a=2,b=1`` by the names of an artifact's classes, or ``balanced``.

Shapes: C classes.
"""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.contracts.fields import CLASS_WEIGHTS_MAX
from fleetune.device_runtime.contracts.manifest import Manifest, Targets
from fleetune.device_runtime.errors import ConfigError, one_line, some

BALANCED = "balanced"
_WEIGHT_MAX = 1e6
_FLAG = "--class-weights"


def named_weights(given: str, manifest: Manifest) -> Floats | None:
    """Read the weights of the classes, float32 (C,); None of ``balanced``, which the data make, and where nothing is given.

    Args:
        given: ``a=2,b=1`` by name, 1 for a class that is not named; ``balanced``; or nothing.
        manifest: of the artifact, which names the classes.

    Raises:
        ConfigError: no such class, a weight that is no number above 0, or a model without classes.
    """
    if not given:
        return None
    _check_model(manifest)
    if is_balanced(given):
        return None
    if len(given) > CLASS_WEIGHTS_MAX or not given.isprintable():
        raise ConfigError(
            f"{_FLAG}: expected {CLASS_WEIGHTS_MAX} printable characters at most, got {len(given)}"
        )
    found = dict(_named(given, manifest.labels))
    return np.array([found.get(name, 1.0) for name in manifest.labels], np.float32)


def is_balanced(given: str) -> bool:
    """Whether the data are to make the weights."""
    return given.strip() == BALANCED


def class_weight_problems(given: str, manifest: Manifest) -> list[str]:
    """Say what is wrong with them for this artifact; nothing if they can be had."""
    try:
        named_weights(given, manifest)
    except ConfigError as exc:
        return [str(exc)]
    return []


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
            shown = one_line(given, length_max=60)
            raise ConfigError(f"{_FLAG} {shown!r}: expected {BALANCED}, or names with weights, as a=2,b=1")
        name = name.strip()
        if name not in names:
            shown = one_line(name, length_max=60)
            raise ConfigError(f"{_FLAG}: no label {shown!r}; have: {some(names, at_most=10)}")
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
        shown = one_line(value.strip(), length_max=40)
        raise ConfigError(f"{_FLAG}: {name}={shown}: expected a number above 0, at most {_WEIGHT_MAX:g}")
    return found
