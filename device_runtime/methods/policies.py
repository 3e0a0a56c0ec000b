"""A layer policy decides each step's layer plan: ``(step, rng, state) -> LayerPlan``.

Stochastic layer dropout per mini-batch is DropPEFT's (arXiv 2503.10217). Ours, because its text does not give them:
how a shape follows from its mean, the clamp at 0.95, at least one active layer, no rescaling at inference, ``exact-k``
(a hard memory budget) and ``suffix``. ``successive`` has its order from Successive Layer Training (Pfeiffer et al.,
NeurIPS 2023, github.com/k1l1/SLT), where the model itself grows, from round to round; that the model is whole from the
start, the adapters of equal blocks are trained, and all blocks but the last get equally many steps, is ours. So is ``cyclic``.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, dropping
from fleetune.device_runtime.contracts.plans import full as full_plan
from fleetune.device_runtime.contracts.wire import PolicySpec
from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.options import problems
from fleetune.device_runtime.tables import Table

PolicyState = dict[str, Any]
"""What a policy remembers between steps; JSON types only, because the checkpoint holds it."""
Policy = Callable[[int, np.random.Generator, PolicyState], LayerPlan]
Rates = NDArray[np.float64]

RATE_MAX = 0.95
"""No layer is dropped more often than this."""
_BISECTIONS = 80


def make_policy(spec: PolicySpec, num_layers: int) -> Policy:
    """Build the policy ``spec`` names for a model of ``num_layers`` blocks.

    Raises:
        ConfigError: an unknown policy or shape, ``drop`` outside [0, 1), or a ``period`` where the policy has none, or none
            where it has one.
    """
    if num_layers < 1:
        raise ConfigError(f"layer policy: a model of {num_layers} layers; expected at least 1")
    if found := problems(spec):
        raise ConfigError(f"layer policy {spec.name!r}: " + "; ".join(found))
    make = POLICIES[spec.name]
    if spec.name in MOVING:
        return make(num_layers, drop=spec.drop, period=spec.period)
    if spec.period:
        others = choices(MOVING)
        raise ConfigError(
            f"layer policy {spec.name!r} has no period, got {spec.period}; policies that have: {others}"
        )
    return make(num_layers, drop=spec.drop, shape=spec.shape)


def full(num_layers: int, *, drop: float = 0.0, shape: str = "uniform") -> Policy:
    """Train every layer in every step."""
    if drop:
        others = choices(POLICIES.keys() - {"full"})
        raise ConfigError(f"layer policy 'full' drops nothing, got drop {drop}; policies that do: {others}")
    plan = full_plan(num_layers)
    return lambda step, rng, state: plan


def bernoulli(num_layers: int, *, drop: float, shape: str = "uniform") -> Policy:
    """Drop each layer independently with its rate; if all fall, one survives, drawn by its chance to live.

    Source: DropPEFT, arXiv 2503.10217, section on stochastic transformer layer dropout.
    """
    rates = drop_rates(num_layers, drop=drop, shape=shape)

    def plan(step: int, rng: np.random.Generator, state: PolicyState) -> LayerPlan:
        dropped = rng.random(num_layers) < rates
        if dropped.all():
            dropped[_draw(rng, 1 - rates, count=1)] = False
        return dropping(num_layers, np.flatnonzero(dropped).tolist())

    return plan


def exact_k(num_layers: int, *, drop: float, shape: str = "uniform") -> Policy:
    """Keep exactly :func:`num_kept` layers, drawn without replacement by ``1 - rate``: a hard budget. Ours."""
    rates = drop_rates(num_layers, drop=drop, shape=shape)
    count = num_kept(num_layers, drop=drop)

    def plan(step: int, rng: np.random.Generator, state: PolicyState) -> LayerPlan:
        kept = _draw(rng, 1 - rates, count=count)
        return dropping(num_layers, set(range(num_layers)) - set(kept.tolist()))

    return plan


def suffix(num_layers: int, *, drop: float, shape: str = "uniform") -> Policy:
    """Run every layer, train the upper :func:`num_kept`: no backward below. ``shape`` has no say. Ours."""
    num_frozen = num_layers - num_kept(num_layers, drop=drop)
    plan = (Mode.FORWARD,) * num_frozen + (Mode.TRAIN,) * (num_layers - num_frozen)
    return lambda step, rng, state: plan


def successive(num_layers: int, *, drop: float, period: int) -> Policy:
    """Run every layer, train one block of :func:`num_kept`: ``period`` steps each of :func:`blocks`, and on the last for good."""
    plans = _block_plans("successive", num_layers, drop=drop, period=period)
    return lambda step, rng, state: plans[min(step // period, len(plans) - 1)]


def cyclic(num_layers: int, *, drop: float, period: int) -> Policy:
    """As ``successive``, and after the last block the first again. Ours."""
    plans = _block_plans("cyclic", num_layers, drop=drop, period=period)
    return lambda step, rng, state: plans[step // period % len(plans)]


def blocks(num_layers: int, *, size: int) -> list[range]:
    """Layers in blocks of ``size``, lowest first; the last one ends with the topmost layer, even if it overlaps the one below."""
    last = num_layers - size
    return [range(first, first + size) for first in (*range(0, last, size), last)]


def num_kept(num_layers: int, *, drop: float) -> int:
    """Layers that ``exact-k`` keeps and those that drop none train: ``round(num_layers * (1 - drop))``, at least 1."""
    return max(1, round(num_layers * (1 - drop)))


def drop_rates(num_layers: int, *, drop: float, shape: str) -> Rates:
    """Drop rate of each layer: ``min(m * shape, 0.95)``, ``m`` such that the mean is ``drop`` (or all reach 0.95)."""
    weights = SHAPES[shape](num_layers)
    low, high = 0.0, RATE_MAX / float(weights.min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if np.minimum(middle * weights, RATE_MAX).mean() < drop:
            low = middle
        else:
            high = middle
    return np.minimum(high * weights, RATE_MAX) if drop else np.zeros(num_layers)


def _uniform(num_layers: int) -> Rates:
    """No prior."""
    return np.ones(num_layers)


def _incremental(num_layers: int) -> Rates:
    """Upper layers fall more often, as in stochastic depth."""
    return np.arange(1, num_layers + 1) / num_layers


def _decay(num_layers: int) -> Rates:
    """Lower layers fall more often."""
    return np.arange(num_layers, 0, -1) / num_layers


def _normal(num_layers: int) -> Rates:
    """Middle layers fall more often; both ends stay."""
    offset = np.arange(num_layers) - (num_layers - 1) / 2
    weights: Rates = np.exp(-0.5 * (offset / (num_layers / 6)) ** 2)
    return weights


def _block_plans(name: str, num_layers: int, *, drop: float, period: int) -> list[LayerPlan]:
    if period < 1:
        raise ConfigError(
            f"layer policy {name!r} stays on a block of layers for a period of at least 1 step, got {period}"
        )
    return [
        tuple(Mode.TRAIN if i in block else Mode.FORWARD for i in range(num_layers))
        for block in blocks(num_layers, size=num_kept(num_layers, drop=drop))
    ]


def _draw(rng: np.random.Generator, weights: Rates, *, count: int) -> NDArray[np.int64]:
    """``count`` indices without replacement: an exponential race, which equals successive weighted sampling."""
    finish = rng.standard_exponential(len(weights)) / weights
    return np.argsort(finish, kind="stable")[:count]


SHAPES: Table[Callable[[int], Rates]] = Table(
    "depth shape", {"uniform": _uniform, "incremental": _incremental, "decay": _decay, "normal": _normal}
)
MOVING: dict[str, Callable[..., Policy]] = {"successive": successive, "cyclic": cyclic}
"""Those with a period."""
POLICIES: Table[Callable[..., Policy]] = Table(
    "policy", {"full": full, "bernoulli": bernoulli, "exact-k": exact_k, "suffix": suffix, **MOVING}
)
