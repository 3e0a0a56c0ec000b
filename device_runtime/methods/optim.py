"""An optimizer is a chain of :mod:`transforms` over named tensors; the maths is torch's, in float32 numpy.

A tensor without a gradient (its layer was dropped) keeps its value, its moments and its own step count, as torch keeps
a parameter whose ``grad`` is None.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, cast

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.work import OptimizerSpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.transforms import (
    Tensors,
    Transform,
    adam,
    chain,
    clip_by_norm,
    decay_weights,
    descend,
    proximal,
)
from fleetune.device_runtime.options import problems
from fleetune.device_runtime.tables import Table


class Optimizer(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, params) -> (params, state)``; state is flat and can be saved."""

    init: Callable[[Arrays], Arrays]
    update: Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]


def make_optimizer(spec: OptimizerSpec, *, total_steps: int) -> Optimizer:
    """Build the chain ``spec`` asks for: proximal term, clip by global norm, the rule named, the scheduled learning rate.

    Args:
        spec: rule, rate and schedule.
        total_steps: where ``decay`` reaches its end.

    Returns:
        The optimizer; its proximal term pulls towards the parameters given to ``init``.

    Raises:
        ConfigError: an unknown name, or a number out of range (all listed).
    """
    _check(spec)
    links = proximal(spec.proximal), clip_by_norm(spec.clip_norm), OPTIMIZERS[spec.name](spec)
    return applied(chain(*links, descend(scheduled_rate(spec, total_steps=total_steps))))


def applied(transform: Transform) -> Optimizer:
    """Make an optimizer of a chain: its last updates are added to the parameters."""

    def update(grads: Arrays, state: Arrays, params: Arrays) -> tuple[Arrays, Arrays]:
        before = cast("Tensors", params)
        updates, entries = transform.update(cast("Tensors", grads), state, before)
        after: Arrays = {name: before[name] + value for name, value in updates.items()}
        return {**params, **after}, {**state, **entries}

    return Optimizer(lambda params: transform.init(cast("Tensors", params)), update)


def scheduled_rate(spec: OptimizerSpec, *, total_steps: int) -> Callable[[int], float]:
    """Make the learning rate a function of the step, from 0."""
    decay = DECAYS[spec.decay]

    def rate(step: int) -> float:
        progress = _progress(step, spec.warmup_steps, total_steps)
        return spec.lr * _warmup(step, spec.warmup_steps) * decay(progress)

    return rate


def _warmup(step: int, warmup_steps: int) -> float:
    """Rise linearly from ``1 / warmup_steps`` at the first step to 1: no step is wasted at rate 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Tell the share of the steps after the warm-up that is behind us, in [0, 1]."""
    return min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))


def _check(spec: OptimizerSpec) -> None:
    if found := problems(spec):
        raise ConfigError(f"optimizer {spec.name!r}: " + "; ".join(found))


def _adamw(spec: OptimizerSpec) -> Transform:
    """Scale as Adam, then decay weights apart from it. Source: Loshchilov and Hutter, arXiv 1711.05101."""
    return chain(adam(), decay_weights(spec.weight_decay))


def _sgd(spec: OptimizerSpec) -> Transform:
    """Descend as ``torch.optim.SGD``: weight decay is part of the gradient."""
    return decay_weights(spec.weight_decay)


DECAYS: Table[Callable[[float], float]] = Table(
    "decay",
    {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    },
)
OPTIMIZERS: Table[Callable[[OptimizerSpec], Transform]] = Table("optimizer", {"adamw": _adamw, "sgd": _sgd})
