"""A layer policy decides each step's layer plan, and, where rows have gates of their own, which rows run through which layer.

The families are in ``dropping`` (which layers are left out is drawn) and ``suffixes`` (all run, some train), with their sources.
"""

from collections.abc import Iterator

import msgspec

from fleetune.device_runtime.contracts.plans import full as full_plan
from fleetune.device_runtime.contracts.plans import trained_layers
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.methods.dropping import bernoulli, coto, dropbp, exact_k, lowest_drawn, row_gates
from fleetune.device_runtime.methods.policy import Policy, PolicyFamily, RowGates
from fleetune.device_runtime.methods.schedules import SCHEDULES
from fleetune.device_runtime.methods.shapes import SHAPES, num_kept
from fleetune.device_runtime.methods.suffixes import block, cyclic, growing, head, successive, suffix
from fleetune.device_runtime.options import problems, refuse
from fleetune.device_runtime.tables import Table

_UNITS = {"period": "step", "width": "layer"}
_STILL_AT_FIRST = ("suffix", "head", "block", "growing")
"""Policies whose first steps all train the same layers."""
_STILL_ALWAYS = ("suffix", "head", "block")
"""Policies all of whose steps do."""
_DRAWN = ("drop", "shape", "schedule", "horizon", "protected", "protect")


def make_policy(spec: PolicySpec, num_layers: int) -> Policy:
    """Build the policy ``spec`` names for a model of ``num_layers`` layers.

    Raises:
        ConfigError: an unknown policy, shape or schedule, a number out of range, a field given that the policy has no use for,
            one missing that it needs, or more layers asked for than there are; everything that is wrong.
    """
    if num_layers < 1:
        raise ConfigError(f"layer policy: a model of {num_layers} layers; expected at least 1")
    tables = {table.kind: table for table in (POLICIES, SHAPES, SCHEDULES)}
    if found := problems(spec, tables):
        refuse([f"layer policy {spec.name!r}: " + "; ".join(found)])
    family = POLICIES[spec.name]
    if found := [*_objections(spec, num_layers, family)]:
        raise ConfigError(f"layer policy {spec.name!r} " + "; ".join(found))
    return family.make(num_layers, spec)


def make_gates(spec: PolicySpec, num_layers: int) -> RowGates | None:
    """Build the row gates of a policy that :func:`make_policy` takes; None where a layer runs on a whole batch or not at all."""
    return row_gates(num_layers, spec) if spec.gates == "row" else None


def frozen_below(spec: PolicySpec, num_layers: int) -> int:
    """The layer below which no step trains any, though which is the lowest changes; -1 where each plan tells that itself."""
    return lowest_drawn(num_layers, spec) if spec.name in ("dropbp", "coto") else -1


def still_layers(spec: PolicySpec, num_layers: int) -> frozenset[int]:
    """Return the layers that no step trains, whatever is drawn."""
    if spec.name not in _STILL_ALWAYS:
        return frozenset(range(max(frozen_below(spec, num_layers), 0)))
    plan = make_policy(spec, num_layers)(0, Draws(0, "plans", 0), {})
    return frozenset(range(num_layers)) - frozenset(trained_layers(plan))


def first_boundary(spec: PolicySpec, num_layers: int) -> int:
    """The layer below which the first steps train nothing, whatever is drawn; 0 if there is none."""
    if spec.name not in _STILL_AT_FIRST:
        return max(frozen_below(spec, num_layers), 0)
    plan = make_policy(spec, num_layers)(0, Draws(0, "plans", 0), {})
    return min(trained_layers(plan), default=num_layers)


def full(num_layers: int, spec: PolicySpec) -> Policy:
    """Train every layer in every step."""
    plan = full_plan(num_layers)
    return lambda step, draws, state: plan


def _objections(spec: PolicySpec, num_layers: int, family: PolicyFamily) -> Iterator[str]:
    if useless := _useless(spec, family.uses):
        yield "has no use for " + "; ".join(useless)
    for field in family.needs:
        if not getattr(spec, field):
            yield f"needs a {field} of at least 1 {_UNITS[field]}, got 0"
    if "schedule" in family.uses:
        yield from _schedule_objections(spec)
        yield from _protection_objections(spec, num_layers)
    if "width" in family.uses and spec.first + spec.width > num_layers:
        yield f"wants layers {spec.first} to {spec.first + spec.width - 1}; the model's last is {num_layers - 1}"


def _schedule_objections(spec: PolicySpec) -> Iterator[str]:
    if spec.schedule != "constant" and not spec.horizon:
        yield f"needs a horizon of at least 1 step for its schedule {spec.schedule!r}, got 0"
    if spec.schedule == "constant" and spec.horizon:
        yield f"has no use for horizon, got {spec.horizon}, with schedule 'constant'"


def _protection_objections(spec: PolicySpec, num_layers: int) -> Iterator[str]:
    if spec.protect != "ends" and not spec.protected:
        yield f"has no use for protect, got {spec.protect!r}, with 0 layers protected"
    size = spec.width or num_layers
    if spec.drop and spec.protected > min(num_kept(size, drop=spec.drop), size - 1):
        yield f"cannot drop {spec.drop:g} of {size} layers with {spec.protected} protected"


def _useless(spec: PolicySpec, uses: tuple[str, ...]) -> list[str]:
    given, default = msgspec.to_builtins(spec), msgspec.to_builtins(PolicySpec())
    names = [n for n in given if n not in ("name", *uses) and given[n] != default[n]]
    return [f"{n}, got {given[n]!r}; policies that have: {choices(_users(n))}" for n in names]


def _users(field: str) -> list[str]:
    return [name for name, family in POLICIES.items() if field in family.uses]


POLICIES: Table[PolicyFamily] = Table(
    "policy",
    {
        "full": PolicyFamily(full),
        "head": PolicyFamily(head),
        "bernoulli": PolicyFamily(bernoulli, uses=(*_DRAWN, "gates")),
        "exact-k": PolicyFamily(exact_k, uses=(*_DRAWN, "gates")),
        "dropbp": PolicyFamily(dropbp, uses=(*_DRAWN, "width")),
        "coto": PolicyFamily(coto, uses=(*_DRAWN, "width")),
        "suffix": PolicyFamily(suffix, uses=("drop",)),
        "growing": PolicyFamily(growing, uses=("drop", "period", "width"), needs=("period", "width")),
        "block": PolicyFamily(block, uses=("width", "first"), needs=("width",)),
        "successive": PolicyFamily(successive, uses=("drop", "period"), needs=("period",)),
        "cyclic": PolicyFamily(cyclic, uses=("drop", "period"), needs=("period",)),
    },
)
