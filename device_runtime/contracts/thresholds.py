"""Thresholds of an adapter's rank components: what falls below is pruned, and in a job of thresholds they alone travel.

A component is a row of lora_A, which for the column of lora_B that it feeds is a filter; its threshold is an element of the
tensor ``A.threshold``, float32 (r,), beside the adapter's own. Pruning a row of A makes its component of B A zero.

Source: Kim et al., SpaFL, arXiv 2406.00431, as its code for FMNIST has it, where a filter is a row of a linear layer. LoRA's
rows in the place of a model's filters are ours. A pair that would lose all of its rows begins at zero again, as there a layer
that keeps at most a hundredth of them.
"""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays, Floats
from fleetune.device_runtime.contracts.work import NOTHING, THRESHOLDS, LocalWork
from fleetune.device_runtime.errors import WireError

END = ".threshold"
PENALTY = 5e-4
"""SpaFL's weight of sum exp(-threshold) in the loss; its scripts have 1e-4 to 7e-4."""
_A = ".lora_A.weight"


def stays(work: LocalWork) -> bool:
    """Whether all parameters stay on the device."""
    return work.mask in (THRESHOLDS, NOTHING)


def blank_thresholds(arrays: Mapping[str, Array]) -> Arrays:
    """Thresholds of zero, which prune nothing, for every lora_A of an adapter."""
    return {name + END: np.zeros(a.shape[0], "<f4") for name, a in arrays.items() if name.endswith(_A)}


def thresholds_of(arrays: Mapping[str, Array]) -> Arrays:
    """The thresholds among an adapter's tensors."""
    return {name: value for name, value in arrays.items() if name.endswith(END)}


def parameters_of(arrays: Mapping[str, Array]) -> Arrays:
    """All tensors but the thresholds."""
    return {name: value for name, value in arrays.items() if not name.endswith(END)}


def pruned(arrays: Mapping[str, Array]) -> Arrays:
    """The adapter that a model runs with: rows of A whose mean magnitude is not above their threshold are zero."""
    found = parameters_of(arrays)
    for name, threshold in thresholds_of(arrays).items():
        a = _floats(arrays[name.removesuffix(END)])
        found[name.removesuffix(END)] = a * _kept(a, _floats(threshold)).reshape(_beside(a))
    return found


def straight_through(grads: Mapping[str, Array], arrays: Mapping[str, Array]) -> Arrays:
    """Gradients of parameters and thresholds from those of the pruned adapter.

    With w a row of A, n its elements, m = mean |w|, t its threshold, the pruned row w s(m - t), s the step function, whose
    derivative is taken to be 1 within 1 of the step and 0 elsewhere, and G the gradient of the pruned row::

        c = s'(m - t) sum_j G_j w_j
        dL/dw_j = s(m - t) G_j + c sign(w_j) / n
        dL/dt = -c - PENALTY exp(-t)

    The first two are the chain rule through both places of w. A threshold whose A has no gradient has none. SpaFL's code for
    CIFAR has s' the other way around, 0 within 1 of the step: there a threshold near it learns from the penalty alone.
    """
    found = dict(grads)
    for name, threshold in thresholds_of(arrays).items():
        if (of := name.removesuffix(END)) not in grads:
            continue
        a, t, g = (_floats(value) for value in (arrays[of], threshold, grads[of]))
        flat, rise = a.reshape(len(a), -1), g.reshape(len(a), -1)
        above = _mean(a) - t
        c = np.where(np.abs(above) <= 1, (rise * flat).sum(axis=1), np.float32(0))
        along = (c / np.float32(flat.shape[1]))[:, None] * np.sign(flat)
        found[of] = ((above > 0)[:, None] * rise + along).reshape(a.shape)
        found[name] = -c - np.float32(PENALTY) * np.exp(-t)
    return found


def descended(arrays: Mapping[str, Array], grads: Mapping[str, Array], lr: float) -> Arrays:
    """Thresholds after a step of plain descent, as SpaFL takes it; those of a pair that would keep no row are zero again."""
    found: Arrays = {}
    for name, threshold in thresholds_of(arrays).items():
        t = _floats(threshold)
        t = t - np.float32(lr) * _floats(grads[name]) if name in grads else t
        is_some = _kept(_floats(arrays[name.removesuffix(END)]), t).any()
        found[name] = t if is_some else np.zeros_like(t)
    return found


def moved(arrays: Mapping[str, Array], thresholds: Mapping[str, Array]) -> Arrays:
    """An adapter with other thresholds, in copies: each row of A goes along, by -(new - old) sign(sum of the row) / n.

    So a device takes over what the fleet's thresholds say of a component (SpaFL: the update of the parameters).

    Raises:
        WireError: a threshold is not finite, or of no A of this adapter.
    """
    found = {name: np.array(value) for name, value in arrays.items()}
    for name, value in thresholds.items():
        of = name.removesuffix(END)
        if of not in arrays or value.shape != arrays[of].shape[:1] or not np.isfinite(_floats(value)).all():
            raise WireError(f"{name}: no thresholds of this adapter, or one that is not finite")
        a, new = _floats(arrays[of]), _floats(value)
        flat = a.reshape(len(a), -1)
        rise = (new - _floats(arrays[name])) * np.sign(flat.sum(axis=1)) / np.float32(flat.shape[1])
        found[of], found[name] = (flat - rise[:, None]).reshape(a.shape), new.copy()
    return found


def _kept(a: Floats, threshold: Floats) -> NDArray[np.bool_]:
    return np.asarray(_mean(a) - threshold > 0)


def _mean(a: Floats) -> Floats:
    """Mean magnitude of each row."""
    return np.asarray(np.abs(a).reshape(len(a), -1).mean(axis=1), np.float32)


def _beside(a: Floats) -> tuple[int, ...]:
    return (-1,) + (1,) * (a.ndim - 1)


def _floats(value: Array) -> Floats:
    return np.asarray(value, np.float32)
