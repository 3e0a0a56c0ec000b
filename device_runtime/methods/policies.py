"""A layer policy decides each step's layer plan: ``(step, draws, state) -> LayerPlan``.

Stochastic layer dropout per mini-batch is DropPEFT's (arXiv 2503.10217). Ours, because its text does not give them:
how a shape follows from its mean, the clamp at 0.95, at least one active layer, no rescaling at inference, ``exact-k``
(a hard memory budget) and ``suffix``. ``successive`` has its order from Successive Layer Training (Pfeiffer et al.,
NeurIPS 2023, github.com/k1l1/SLT), where the model itself grows, from round to round; that the model is whole from the
start, the adapters of equal groups are trained, and all groups but the last get equally many steps, is ours. So is ``cyclic``.

Rates are made by + - * / and comparisons in a written order: other languages get the same bits (``docs/draws.md``).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, dropping
from fleetune.device_runtime.contracts.plans import full as full_plan
from fleetune.device_runtime.contracts.wire import PolicySpec
from fleetune.device_runtime.draws import Doubles, Draws
from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.options import problems
from fleetune.device_runtime.tables import Table

PolicyState = dict[str, Any]
"""What a policy remembers between steps; JSON types only, because the checkpoint holds it."""
Policy = Callable[[int, Draws, PolicyState], LayerPlan]

RATE_MAX = 0.95
"""No layer is dropped more often than this."""
_BISECTIONS = 80
_EXP_TERMS, _EXP_SQUARINGS = 12, 4


class PolicyFamily(NamedTuple):
    """A policy before it has its numbers."""

    make: Callable[[int, PolicySpec], Policy]
    uses: tuple[str, ...] = ()
    """Fields of the spec that it reads; any other must stand at its default."""


def make_policy(spec: PolicySpec, num_layers: int) -> Policy:
    """Build the policy ``spec`` names for a model of ``num_layers`` layers.

    Raises:
        ConfigError: an unknown policy or shape, ``drop`` outside [0, 1), a ``period`` below 1 where the policy needs one, or a
            field given that the policy has no use for.
    """
    if num_layers < 1:
        raise ConfigError(f"layer policy: a model of {num_layers} layers; expected at least 1")
    if found := problems(spec):
        raise ConfigError(f"layer policy {spec.name!r}: " + "; ".join(found))
    family = POLICIES[spec.name]
    if useless := _useless(spec, family.uses):
        raise ConfigError(f"layer policy {spec.name!r} has no use for " + "; ".join(useless))
    return family.make(num_layers, spec)


def full(num_layers: int, spec: PolicySpec) -> Policy:
    """Train every layer in every step."""
    plan = full_plan(num_layers)
    return lambda step, draws, state: plan


def head(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train none: the head alone learns, and a hidden cache holds all that is below it. Ours, as a control."""
    plan = (Mode.FORWARD,) * num_layers
    return lambda step, draws, state: plan


def bernoulli(num_layers: int, spec: PolicySpec) -> Policy:
    """Drop each layer independently with its rate; if all fall, one survives, drawn by its chance to live.

    Source: DropPEFT, arXiv 2503.10217, section on stochastic transformer layer dropout.
    """
    rates = drop_rates(num_layers, drop=spec.drop, shape=spec.shape)

    def plan(step: int, draws: Draws, state: PolicyState) -> LayerPlan:
        dropped = draws.uniforms(num_layers) < rates
        if dropped.all():
            dropped[draws.weighted(1 - rates, count=1)] = False
        return dropping(num_layers, np.flatnonzero(dropped).tolist())

    return plan


def exact_k(num_layers: int, spec: PolicySpec) -> Policy:
    """Keep exactly :func:`num_kept` layers, drawn without replacement by ``1 - rate``: a hard budget. Ours."""
    rates = drop_rates(num_layers, drop=spec.drop, shape=spec.shape)
    count = num_kept(num_layers, drop=spec.drop)

    def plan(step: int, draws: Draws, state: PolicyState) -> LayerPlan:
        kept = draws.weighted(1 - rates, count=count)
        return dropping(num_layers, set(range(num_layers)) - set(kept.tolist()))

    return plan


def suffix(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train the upper :func:`num_kept`: no backward below. Ours."""
    num_frozen = num_layers - num_kept(num_layers, drop=spec.drop)
    plan = (Mode.FORWARD,) * num_frozen + (Mode.TRAIN,) * (num_layers - num_frozen)
    return lambda step, draws, state: plan


def successive(num_layers: int, spec: PolicySpec) -> Policy:
    """Run every layer, train one group of :func:`num_kept`: ``period`` steps each of :func:`layer_groups`, the last for good."""
    plans = _group_plans(num_layers, spec)
    return lambda step, draws, state: plans[min(step // spec.period, len(plans) - 1)]


def cyclic(num_layers: int, spec: PolicySpec) -> Policy:
    """Train as ``successive`` does, and after the last group the first again. Ours."""
    plans = _group_plans(num_layers, spec)
    return lambda step, draws, state: plans[step // spec.period % len(plans)]


def layer_groups(num_layers: int, *, size: int) -> list[range]:
    """Cut layers into groups of ``size``, lowest first; the last ends with the topmost layer, overlapping if it must."""
    last = num_layers - size
    return [range(first, first + size) for first in (*range(0, last, size), last)]


def num_kept(num_layers: int, *, drop: float) -> int:
    """Count the layers that ``exact-k`` keeps and those that drop none train: ``round(num_layers * (1 - drop))``, at least 1."""
    return max(1, round(num_layers * (1 - drop)))


def drop_rates(num_layers: int, *, drop: float, shape: str) -> Doubles:
    """Rate of each layer: ``min(m * shape, 0.95)``, ``m`` such that the mean is ``drop`` (or all reach 0.95)."""
    weights = SHAPES[shape](num_layers)
    low, high = 0.0, RATE_MAX / float(weights.min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _mean(np.minimum(middle * weights, RATE_MAX)) < drop:
            low = middle
        else:
            high = middle
    return np.minimum(high * weights, RATE_MAX) if drop else np.zeros(num_layers)


def _uniform(num_layers: int) -> Doubles:
    """No prior."""
    return np.ones(num_layers)


def _incremental(num_layers: int) -> Doubles:
    """Upper layers fall more often, as in stochastic depth."""
    return np.arange(1, num_layers + 1) / num_layers


def _decay(num_layers: int) -> Doubles:
    """Lower layers fall more often."""
    return np.arange(num_layers, 0, -1) / num_layers


def _normal(num_layers: int) -> Doubles:
    """Middle layers fall more often; both ends stay."""
    offset = (np.arange(num_layers) - (num_layers - 1) / 2) / (num_layers / 6)
    return _exp_of_minus(0.5 * (offset * offset))


def _exp_of_minus(x: Doubles) -> Doubles:
    """Compute e**-x for x in [0, 5] by + * / alone: a library's ``exp`` differs in its last bit from another's."""
    y, series = x / 2.0**_EXP_SQUARINGS, np.ones_like(x)
    for j in range(_EXP_TERMS, 0, -1):
        series = 1 + y * series / j
    for _ in range(_EXP_SQUARINGS):
        series = series * series
    return 1 / series


def _mean(x: Doubles) -> float:
    """Mean by one addition at a time from the left; ``np.mean`` adds in an order of its own."""
    return float(np.cumsum(x)[-1]) / len(x)


def _group_plans(num_layers: int, spec: PolicySpec) -> list[LayerPlan]:
    if spec.period < 1:
        raise ConfigError(
            f"layer policy {spec.name!r} stays on a group of layers for a period of at least 1 step, got {spec.period}"
        )
    return [
        tuple(Mode.TRAIN if i in group else Mode.FORWARD for i in range(num_layers))
        for group in layer_groups(num_layers, size=num_kept(num_layers, drop=spec.drop))
    ]


def _useless(spec: PolicySpec, uses: tuple[str, ...]) -> list[str]:
    given, default = msgspec.to_builtins(spec), msgspec.to_builtins(PolicySpec())
    names = [n for n in given if n not in ("name", *uses) and given[n] != default[n]]
    return [f"{n}, got {given[n]!r}; policies that have: {choices(_users(n))}" for n in names]


def _users(field: str) -> list[str]:
    return [name for name, family in POLICIES.items() if field in family.uses]


SHAPES: Table[Callable[[int], Doubles]] = Table(
    "depth shape", {"uniform": _uniform, "incremental": _incremental, "decay": _decay, "normal": _normal}
)
POLICIES: Table[PolicyFamily] = Table(
    "policy",
    {
        "full": PolicyFamily(full),
        "head": PolicyFamily(head),
        "bernoulli": PolicyFamily(bernoulli, uses=("drop", "shape")),
        "exact-k": PolicyFamily(exact_k, uses=("drop", "shape")),
        "suffix": PolicyFamily(suffix, uses=("drop",)),
        "successive": PolicyFamily(successive, uses=("drop", "period")),
        "cyclic": PolicyFamily(cyclic, uses=("drop", "period")),
    },
)
