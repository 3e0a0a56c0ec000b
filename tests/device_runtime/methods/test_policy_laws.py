"""What holds for every layer policy: a new one is a line in support/policies.py, a new field of the spec one in CHANGES."""

import json

import msgspec
import pytest
from policies import SPECS, effects

from fleetune.device_runtime.contracts.plans import Mode, active_layers, full, trained_layers
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.policies import POLICIES, make_policy
from fleetune.device_runtime.methods.protection import EFFECTS
from fleetune.device_runtime.methods.shapes import SHAPES

CHANGES = {
    "drop": 0.25, "shape": "decay", "period": 5, "schedule": "tail", "horizon": 7, "protected": 2, "protect": "effect",
    "gates": "row", "width": 2, "first": 2,
}  # fmt: skip
DEPTHS = (1, 2, 6, 24)
NUM_STEPS = 30

every_policy = pytest.mark.parametrize("spec", SPECS, ids=[spec.name for spec in SPECS])


def plans(spec, num_layers=12, *, seed=7, cut=None):
    """The first plans of a run; ``cut``: stop before this step, and go on with what a checkpoint keeps."""
    if num_layers == 1:  # nothing can be dropped beside a protected layer
        spec = msgspec.structs.replace(spec, protected=0)
    policy, state, made = make_policy(spec, num_layers), {EFFECTS: effects(num_layers)}, []
    for step in range(NUM_STEPS):
        if step == cut:
            policy, state = make_policy(spec, num_layers), json.loads(json.dumps(state))
        made.append(policy(step, Draws(seed, "plans", step), state))
    return made


def test_every_policy_and_every_field_of_its_spec_is_here():
    assert [spec.name for spec in SPECS] == list(POLICIES)
    assert {"name", *CHANGES} == set(PolicySpec.__struct_fields__)


@every_policy
def test_every_plan_has_a_mode_per_layer_and_something_that_trains(spec):
    varied = [spec]
    if "drop" in POLICIES[spec.name].uses:
        varied += [msgspec.structs.replace(spec, drop=drop) for drop in (0.0, 0.94)]
    if "shape" in POLICIES[spec.name].uses:
        varied += [msgspec.structs.replace(spec, drop=0.9, shape=shape) for shape in SHAPES]
        varied += [msgspec.structs.replace(spec, protected=0)]
    for num_layers in DEPTHS:
        for plan in [plan for chosen in varied for plan in plans(chosen, num_layers)]:
            assert len(plan) == num_layers
            assert all(isinstance(mode, Mode) for mode in plan)
            assert set(trained_layers(plan)) <= set(active_layers(plan))
            assert bool(trained_layers(plan)) is (spec.name != "head")


@every_policy
def test_equal_draws_make_equal_plans(spec):
    assert plans(spec) == plans(spec)


@every_policy
def test_a_run_that_is_resumed_makes_the_plans_of_one_that_is_not(spec):
    for cut in (1, 4, 17):
        assert plans(spec, cut=cut) == plans(spec)


@pytest.mark.parametrize(
    "spec", [spec for spec in SPECS if spec.drop and not spec.width], ids=lambda spec: spec.name
)
def test_drop_zero_trains_every_layer(spec):
    assert set(plans(msgspec.structs.replace(spec, drop=0.0))) == {full(12)}


@pytest.mark.parametrize("field", CHANGES)
@every_policy
def test_a_field_is_of_use_or_refused(spec, field):
    changed = msgspec.structs.replace(spec, **{field: CHANGES[field]})
    if field in POLICIES[spec.name].uses:
        assert plans(changed) != plans(spec)
    else:
        users = ", ".join(sorted(name for name in POLICIES if field in POLICIES[name].uses))
        said = f"'{spec.name}' has no use for {field}, got {CHANGES[field]!r}; policies that have: {users}"
        with pytest.raises(ConfigError, match=said):
            make_policy(changed, 6)
