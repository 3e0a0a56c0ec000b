"""Optimizers are pairs of pure functions over named tensors; the maths is torch's, in float32 numpy.

A tensor without a gradient (its layer was dropped) keeps its value, its moments and its own step count, as torch keeps
a parameter whose ``grad`` is None.
"""

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple, cast

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats
from fleetune.device_runtime.contracts.wire import OptimizerSpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import problems
from fleetune.device_runtime.tables import Table

STEP = "step"
"""State entry that counts updates, int64 (1,); every other entry is ``slot/tensor name``."""
Slots = dict[str, Array]


class Optimizer(NamedTuple):
    """``init(params) -> state`` and ``update(grads, state, params) -> (params, state)``; state is flat and can be saved."""

    init: Callable[[Arrays], Arrays]
    update: Callable[[Arrays, Arrays, Arrays], tuple[Arrays, Arrays]]


class Rule(NamedTuple):
    """One tensor's descent: ``init(param) -> slots``; ``step(grad, param, slots, lr) -> (param, slots)``."""

    slots: tuple[str, ...]
    init: Callable[[Floats], Slots]
    step: Callable[[Floats, Floats, Slots, float], tuple[Floats, Slots]]


def make_optimizer(spec: OptimizerSpec, *, total_steps: int) -> Optimizer:
    """Clip by global norm, then follow the rule ``spec`` names at the scheduled learning rate.

    Args:
        spec: rule, rate and schedule.
        total_steps: where ``decay`` reaches its end.

    Raises:
        ConfigError: an unknown name, or a number out of range (all listed).
    """
    _check(spec)
    rule, decay = OPTIMIZERS[spec.name](spec), DECAYS[spec.decay]

    def update(grads: Arrays, state: Arrays, params: Arrays) -> tuple[Arrays, Arrays]:
        step = _count(state[STEP])
        progress = _progress(step, spec.warmup_steps, total_steps)
        lr = spec.lr * _warmup(step, spec.warmup_steps) * decay(progress)
        if spec.clip_norm:
            grads = clip_by_norm(grads, spec.clip_norm)
        new_params, new_state = dict(params), dict(state)
        for name, grad in grads.items():
            slots = _slots_of(rule, state, name) or rule.init(cast("Floats", params[name]))
            value, slots = rule.step(cast("Floats", grad), cast("Floats", params[name]), slots, lr)
            new_params[name] = value
            new_state.update({f"{slot}/{name}": array for slot, array in slots.items()})
        new_state[STEP] = np.array([step + 1], np.int64)
        return new_params, new_state

    return Optimizer(lambda params: {STEP: np.zeros(1, np.int64)}, update)


def adamw(weight_decay: float = 0.0, *, beta1: float = 0.9, beta2: float = 0.999, eps: float = 1e-8) -> Rule:
    """Adam with decoupled weight decay and bias correction, by each tensor's own step count.

    Source: Loshchilov and Hutter, arXiv 1711.05101; agrees with ``torch.optim.AdamW``.
    """

    def init(param: Floats) -> Slots:
        return {"steps": np.zeros(1, np.int64), "m": np.zeros_like(param), "v": np.zeros_like(param)}

    def step(grad: Floats, param: Floats, slots: Slots, lr: float) -> tuple[Floats, Slots]:
        t = _count(slots["steps"]) + 1
        m = cast("Floats", slots["m"]) * np.float32(beta1) + grad * np.float32(1 - beta1)
        v = cast("Floats", slots["v"]) * np.float32(beta2) + grad * grad * np.float32(1 - beta2)
        root: Floats = np.sqrt(v)
        denominator = root / np.float32(math.sqrt(1 - beta2**t)) + np.float32(eps)
        shrunk = param * np.float32(1 - lr * weight_decay)
        value: Floats = shrunk - np.float32(lr / (1 - beta1**t)) * (m / denominator)
        return value, {"steps": np.array([t], np.int64), "m": m, "v": v}

    return Rule(("steps", "m", "v"), init, step)


def sgd(weight_decay: float = 0.0, *, momentum: float = 0.0) -> Rule:
    """Gradient descent, heavy-ball momentum if asked; agrees with ``torch.optim.SGD`` (weight decay is coupled)."""

    def init(param: Floats) -> Slots:
        return {"momentum": np.zeros_like(param)} if momentum else {}

    def step(grad: Floats, param: Floats, slots: Slots, lr: float) -> tuple[Floats, Slots]:
        d: Floats = grad + np.float32(weight_decay) * param
        if momentum:
            d = np.float32(momentum) * cast("Floats", slots["momentum"]) + d
        return param - np.float32(lr) * d, ({"momentum": d} if momentum else {})

    return Rule(("momentum",) if momentum else (), init, step)


def clip_by_norm(grads: Mapping[str, Array], norm_max: float) -> Arrays:
    """Scale gradients so that their joint L2 norm is at most ``norm_max``; as ``torch.nn.utils.clip_grad_norm_``."""
    norms = [np.linalg.norm(cast("Floats", grad).ravel()) for grad in grads.values()]
    scale = np.float32(min(1.0, norm_max / (float(np.linalg.norm(norms)) + 1e-6)))
    return {name: cast("Floats", grad) * scale for name, grad in grads.items()}


def _count(counter: Array) -> int:
    return int(counter.astype(np.int64)[0])


def _check(spec: OptimizerSpec) -> None:
    if found := problems(spec):
        raise ConfigError(f"optimizer {spec.name!r}: " + "; ".join(found))


def _slots_of(rule: Rule, state: Arrays, name: str) -> Slots:
    return {slot: state[f"{slot}/{name}"] for slot in rule.slots if f"{slot}/{name}" in state}


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear from ``1 / warmup_steps`` at the first step to 1: no step is wasted at rate 0."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0


def _progress(step: int, warmup_steps: int, total_steps: int) -> float:
    """Share of the steps after the warm-up that is behind us, in [0, 1]."""
    return min(1.0, max(0, step - warmup_steps) / max(1, total_steps - warmup_steps))


DECAYS: Table[Callable[[float], float]] = Table(
    "decay",
    {
        "constant": lambda progress: 1.0,
        "linear": lambda progress: 1 - progress,
        "cosine": lambda progress: 0.5 * (1 + math.cos(math.pi * progress)),
    },
)
OPTIMIZERS: Table[Callable[[OptimizerSpec], Rule]] = Table(
    "optimizer", {"adamw": lambda spec: adamw(spec.weight_decay), "sgd": lambda spec: sgd(spec.weight_decay)}
)
