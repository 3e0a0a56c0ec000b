"""Policies that draw, step by step, which layers are left out, and in what way.

Stochastic layer dropout per mini-batch (``bernoulli``) is DropPEFT's (arXiv 2503.10217). ``dropbp`` is DropBP's (arXiv
2402.17812): the forward pass stays exact, and the gradient goes around the layers left out; ours are whole layers in the place of
its sub-layers, rates by depth shape in the place of its sensitivities, and a fixed number a step. ``coto`` is CoTo's (arXiv
2506.05713): all layers run, some without their adapter, fewer and fewer of them with schedule ``falling``. Gates for single
rows are Elhoushi et al.'s (arXiv 2609.05275). Ours besides: at least one layer that trains, ``exact-k`` (a hard memory budget),
equally many rows at each layer in every step, protected layers, and ``width``.

Nothing is rescaled, in training or after. A kept branch times 1 / (1 - rate), as for layers with their norm before them, harms
encoders with their norm after: bge-small with half of its layers keeps a cosine of 0.77 to its full depth, rescaled 0.49
(forward passes alone, ``docs/lab.md``).
"""

from collections.abc import Callable
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.plans import LayerPlan, Mode
from fleetune.device_runtime.contracts.plans import full as full_plan
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Doubles, Draws
from fleetune.device_runtime.methods.policy import Policy, PolicyState, RowGates
from fleetune.device_runtime.methods.protection import protected_layers
from fleetune.device_runtime.methods.schedules import SCHEDULES
from fleetune.device_runtime.methods.shapes import drop_rates, num_kept


def bernoulli(num_layers: int, spec: PolicySpec) -> Policy:
    """Drop each layer independently with its rate; if all fall, one survives, drawn by its chance to live.

    Source: DropPEFT, arXiv 2503.10217, section on stochastic transformer layer dropout.
    """
    return _whole(num_layers) if spec.gates == "row" else _one_by_one(num_layers, spec, Mode.DROP)


def exact_k(num_layers: int, spec: PolicySpec) -> Policy:
    """Keep exactly :func:`num_kept` layers, drawn without replacement by ``1 - rate``: a hard budget. Ours."""
    return _whole(num_layers) if spec.gates == "row" else _so_many(num_layers, spec, Mode.DROP)


def dropbp(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train :func:`num_kept`, drawn as ``exact-k`` does; the gradient goes around the others.

    Source: DropBP, arXiv 2402.17812.
    """
    return _so_many(num_layers, spec, Mode.BYPASS)


def coto(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, with its adapter by chance ``1 - rate``; at least one has it.

    Source: CoTo, arXiv 2506.05713, whose chance rises in a straight line to 1: schedule ``falling``.
    """
    return _one_by_one(num_layers, spec, Mode.BARE)


def row_gates(num_layers: int, spec: PolicySpec) -> RowGates:
    """Let each layer run on exactly ``round(rows * (1 - rate))`` rows of a batch, drawn for each layer; protected ones on all.

    If no layer would run at all, one does, drawn by its chance to live. ``exact-k`` and ``bernoulli`` are the same so. Ours.
    """
    chances_at = _chances(num_layers, spec)

    def gates(step: int, draws: Draws, state: PolicyState, num_rows: int) -> NDArray[np.bool_]:
        rates, protected, _ = chances_at(step, state)
        runs = np.ones((num_layers, num_rows), np.bool_)
        for layer in sorted(set(range(num_layers)) - set(protected)):
            count = round(num_rows * (1 - float(rates[layer])))
            runs[layer, draws.permutation(num_rows)[count:]] = False
        if not runs.any():
            runs[draws.weighted(1 - rates, count=1)] = True
        return runs

    return gates


def lowest_drawn(num_layers: int, spec: PolicySpec) -> int:
    """The lowest layer that takes part: all below only run."""
    return num_layers - (spec.width or num_layers)


class _Chances(NamedTuple):
    """Of one step, for the layers that take part: places count from the lowest of them."""

    rates: Doubles
    protected: tuple[int, ...]
    drop: float


def _chances(num_layers: int, spec: PolicySpec) -> Callable[[int, PolicyState], _Chances]:
    lowest = lowest_drawn(num_layers, spec)
    schedule = partial(SCHEDULES[spec.schedule], spec.drop, spec.horizon)
    rates = lru_cache(maxsize=1)(partial(drop_rates, num_layers - lowest, shape=spec.shape))

    def at(step: int, state: PolicyState) -> _Chances:
        found = protected_layers(num_layers, spec, state, lowest=lowest)
        protected, drop = tuple(layer - lowest for layer in found), schedule(step)
        return _Chances(rates(drop=drop, protected=protected), protected, drop)

    return at


def _one_by_one(num_layers: int, spec: PolicySpec, out: Mode) -> Policy:
    chances_at = _chances(num_layers, spec)

    def plan(step: int, draws: Draws, state: PolicyState) -> LayerPlan:
        rates = chances_at(step, state).rates
        fallen = draws.uniforms(len(rates)) < rates
        if fallen.all():
            fallen[draws.weighted(1 - rates, count=1)] = False
        return _planned(num_layers, fallen, out)

    return plan


def _so_many(num_layers: int, spec: PolicySpec, out: Mode) -> Policy:
    chances_at = _chances(num_layers, spec)

    def plan(step: int, draws: Draws, state: PolicyState) -> LayerPlan:
        rates, protected, drop = chances_at(step, state)
        weights, stays = 1 - rates, list(protected)
        weights[stays] = 0.0
        fallen = np.ones(len(rates), np.bool_)
        fallen[stays] = False
        fallen[draws.weighted(weights, count=num_kept(len(rates), drop=drop) - len(stays))] = False
        return _planned(num_layers, fallen, out)

    return plan


def _planned(num_layers: int, fallen: NDArray[np.bool_], out: Mode) -> LayerPlan:
    below = (Mode.FORWARD,) * (num_layers - len(fallen))
    return (*below, *(out if gone else Mode.TRAIN for gone in fallen))


def _whole(num_layers: int) -> Policy:
    plan = full_plan(num_layers)
    return lambda step, draws, state: plan
