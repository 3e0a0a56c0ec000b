"""The arms of a configurator: layer policies with their settings, what a step of each costs, and how deep it goes.

Their list is ours; DropPEFT (arXiv 2503.10217) says that its configurator chooses dropout rates per layer, not which.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import msgspec

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.tasks import arm_name
from fleetune.device_runtime.contracts.plans import LayerPlan, route
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policies import make_policy

FULL_DEPTH = PolicySpec()
SHARES = (0.75, 0.5, 0.25)
"""Of the layers, uppermost: what the suffix arms train; one more trains a single layer."""
DROPPED = 0.25
"""Share of the layers that the dropping arms leave out, at first."""
ENDS = 4
"""Layers that a dropping arm never drops, the outermost: dropping those is what costs accuracy (docs/lab.md)."""
FALLEN_AT = 0.65
"""Share of a job's steps after which a dropping arm drops nothing any more."""
_PLANS = 32
_STEPWISE = ("suffix", "exact-k")
"""Policies that have a neighbour one layer deeper, and one less deep."""


class Arm(NamedTuple):
    """A policy as a choice; ``forward`` and ``back`` are the layers that a step runs there and back, on average."""

    policy: PolicySpec
    forward: float
    back: float
    deepest: tuple[int, int]
    """Most layers that a step goes back through, and that it runs: its memory follows these."""
    lowest: int
    """The lowest layer that any step trains."""

    @property
    def name(self) -> str:
        """As people read it."""
        return arm_name(self.policy)


def units(arm: Arm, ratio: float, *, below: int = 0) -> float:
    """What a step costs, in layers run forward; a layer's way back costs ``ratio`` of that, one below ``below`` nothing."""
    return max(arm.forward - below, 0.0) + ratio * arm.back


def needs_as_much(arm: Arm, than: Arm) -> bool:
    """Whether an arm surely needs no less memory than another."""
    return all(mine >= other for mine, other in zip(arm.deepest, than.deepest, strict=True))


def arm_of(policy: PolicySpec, num_layers: int) -> Arm:
    """Measure a policy by the first plans of a job.

    Raises:
        ConfigError: a model of ``num_layers`` layers cannot be trained so.
    """
    ways = [route(plan) for plan in _plans(policy, num_layers)]
    there, back = ([len(way.layers) for way in ways], [len(way.back) for way in ways])
    lowest = min(way.lowest for way in ways)
    return Arm(policy, sum(there) / len(ways), sum(back) / len(ways), (max(back), max(there)), lowest)


def first_arms(settings: Settings) -> tuple[Arm, ...]:
    """The arms that a job begins with: full depth first, the job's own policy, then what depth and dropping suggest.

    A ledger of an earlier release does not say how many layers there are: then there are the first two alone.
    """
    num_layers = settings.num_layers
    specs = (FULL_DEPTH, settings.work.policy, *(_suggested(settings) if num_layers else ()))
    return tuple(_arms(specs, max(num_layers, 1)))


def neighbours(arm: Arm, num_layers: int) -> tuple[Arm, ...]:
    """The arms one layer less deep and one deeper, where there are such."""
    policy, step = arm.policy, 1 / max(num_layers, 1)
    if policy == FULL_DEPTH:
        return tuple(_arms([_suffix(num_layers - 1, num_layers)], num_layers)) if num_layers > 1 else ()
    if policy.name not in _STEPWISE:
        return ()
    drops = (policy.drop + step, policy.drop - step)
    near = [msgspec.structs.replace(policy, drop=d) for d in drops if step / 2 < d < 1 - step / 2]
    return tuple(_arms(near, num_layers))


def _suggested(settings: Settings) -> Iterator[PolicySpec]:
    num_layers = settings.num_layers
    for share in (*SHARES, 1 / num_layers):
        yield _suffix(max(1, round(num_layers * share)), num_layers)
    if steps := int(FALLEN_AT * settings.rounds * settings.work.steps):
        ends = min(ENDS, num_layers)
        yield PolicySpec(name="exact-k", drop=DROPPED, protected=ends, schedule="falling", horizon=steps)


def _suffix(num_trained: int, num_layers: int) -> PolicySpec:
    return PolicySpec(name="suffix", drop=(num_layers - num_trained) / num_layers)


def _arms(specs: Iterable[PolicySpec], num_layers: int) -> Iterator[Arm]:
    """The arms of those that a model of so many layers takes, each cost and depth of a family once."""
    seen: set[object] = set()
    for spec in specs:
        try:
            arm = arm_of(spec, num_layers)
        except ConfigError:
            continue
        is_whole = (arm.forward, arm.back) == (num_layers, num_layers)
        key = FULL_DEPTH.name if is_whole and spec.name in ("full", *_STEPWISE) else spec
        if key not in seen:
            seen.add(key)
            yield arm


def _plans(policy: PolicySpec, num_layers: int) -> list[LayerPlan]:
    """Plans of the first steps; layers that a device would protect by their effect count as the outermost."""
    plan_of = make_policy(msgspec.structs.replace(policy, protect="ends"), num_layers)
    state: dict[str, object] = {}
    return [plan_of(step, Draws(0, "plans", step), state) for step in range(_PLANS)]
