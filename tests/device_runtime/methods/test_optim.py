import math

import numpy as np
import pytest

from fleetune.device_runtime.arrays import load_arrays, save_arrays
from fleetune.device_runtime.contracts.work import OptimizerSpec
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.methods.optim import (
    DECAYS,
    OPTIMIZERS,
    Optimizer,
    make_optimizer,
)

SHAPES = {"a": (8, 16), "b": (16, 4), "head": (5,)}
NUM_STEPS = 20
TORCHS = {"adamw": "AdamW", "sgd": "SGD"}


def values(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(scale=scale, size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step):
    """Tensor ``a`` belongs to a layer dropped every third step, and from the first."""
    grads = values(100 + step, scale=3.0 if step % 4 else 0.01)
    return {name: g for name, g in grads.items() if name != "a" or step % 3}


def ours(spec, total_steps=NUM_STEPS):
    optimizer = make_optimizer(spec, total_steps=total_steps)
    params, state = values(0), None
    state = optimizer.init(params)
    for step in range(NUM_STEPS):
        params, state = optimizer.update(gradients(step), state, params)
    return params


def torchs(spec, factor):
    torch = pytest.importorskip("torch")
    params = {name: torch.nn.Parameter(torch.tensor(value)) for name, value in values(0).items()}
    kind = getattr(torch.optim, TORCHS[spec.name])
    optimizer = kind(params.values(), lr=spec.lr, weight_decay=spec.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(NUM_STEPS):
        grads = gradients(step)
        for name, param in params.items():
            pull = spec.proximal * (param.detach() - torch.tensor(values(0)[name]))
            param.grad = torch.tensor(grads[name]) + pull if name in grads else None
        if spec.clip_norm:
            torch.nn.utils.clip_grad_norm_(params.values(), spec.clip_norm)
        optimizer.step()
        schedule.step()
    return {name: param.detach().numpy() for name, param in params.items()}


SCHEDULES = {
    "constant": lambda i: 1.0,
    "linear": lambda i: min(1, (i + 1) / 5) * (1 - max(0, i - 5) / 15),
    "cosine": lambda i: min(1, (i + 1) / 5) * 0.5 * (1 + math.cos(math.pi * max(0, i - 5) / 15)),
}


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("name", TORCHS)
def test_twenty_steps_equal_torchs(name, decay, clip_norm):
    warmup_steps = 0 if decay == "constant" else 5
    spec = OptimizerSpec(
        name=name, lr=1e-2, weight_decay=0.05, warmup_steps=warmup_steps, decay=decay, clip_norm=clip_norm
    )
    got, want = ours(spec), torchs(spec, SCHEDULES[decay])
    for tensor in SHAPES:
        np.testing.assert_allclose(got[tensor], want[tensor], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_tensor_without_gradient_is_left_alone_and_inputs_are_not_written_to(name):
    optimizer = make_optimizer(OptimizerSpec(name=name, weight_decay=0.1), total_steps=9)
    params = values(0)
    before = {name: value.copy() for name, value in params.items()}
    after, state = optimizer.update({"b": values(1)["b"]}, optimizer.init(params), params)
    assert after["a"] is params["a"]
    assert not np.array_equal(after["b"], params["b"])
    assert all(np.array_equal(params[n], before[n]) for n in params)
    assert {key.partition("/")[2] for key in state} <= {"", "b"}
    assert all(value.dtype == np.float32 for value in after.values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_state_survives_a_file_to_the_bit(name, tmp_path):
    optimizer = make_optimizer(OptimizerSpec(name=name, decay="cosine"), total_steps=NUM_STEPS)

    def run(params, state, steps):
        for step in steps:
            params, state = optimizer.update(gradients(step), state, params)
        return params, state

    straight, _ = run(values(0), optimizer.init(values(0)), range(10))
    params, state = run(values(0), optimizer.init(values(0)), range(4))
    save_arrays(tmp_path / "state.safetensors", state)
    resumed, _ = run(params, load_arrays(tmp_path / "state.safetensors"), range(4, 10))
    assert all(np.array_equal(straight[n], resumed[n]) for n in SHAPES)


def test_first_adamw_step_by_hand():
    """m/(1-b1) = g, sqrt(v/(1-b2)) = |g|: the first step is lr in the gradient's direction, after decay by 1 - lr * wd."""
    optimizer = make_optimizer(OptimizerSpec(lr=0.1, weight_decay=0.5), total_steps=1)
    params = {"w": np.array([1.0, -2.0], np.float32)}
    after, _ = optimizer.update({"w": np.array([3.0, -0.5], np.float32)}, optimizer.init(params), params)
    np.testing.assert_allclose(after["w"], [0.95 - 0.1, -1.9 + 0.1], rtol=1e-6)


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_a_proximal_term_is_torchs_gradient_of_it_clipped_with_the_rest(clip_norm):
    spec = OptimizerSpec(lr=1e-2, weight_decay=0.05, clip_norm=clip_norm, proximal=0.7)
    got, want = ours(spec), torchs(spec, SCHEDULES["constant"])
    for tensor in SHAPES:
        np.testing.assert_allclose(got[tensor], want[tensor], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_stronger_the_proximal_term_the_nearer_the_end_is_to_the_start(name):
    start, ends = values(0), [ours(OptimizerSpec(name=name, lr=0.01, proximal=mu)) for mu in (0.0, 3.0, 20.0)]
    ways = [sum(float(((end[n] - start[n]) ** 2).sum()) for n in SHAPES) for end in ends]
    assert ways[0] > 1.1 * ways[1] > 1.2 * ways[2]


def test_every_optimizer_goes_downhill():
    for name in OPTIMIZERS:
        optimizer: Optimizer = make_optimizer(OptimizerSpec(name=name, lr=0.05), total_steps=50)
        params = {"w": np.full(3, 2.0, np.float32)}
        state = optimizer.init(params)
        for _ in range(50):
            params, state = optimizer.update({"w": 2 * params["w"]}, state, params)
        assert np.abs(params["w"]).max() < 0.5


def test_wrong_numbers_are_all_listed():
    with pytest.raises(
        ConfigError,
        match=r"lr must be above 0, got 0.0; weight_decay .* nan; clip_norm .* -1.0; proximal must be at least 0, got -2.0",
    ):
        make_optimizer(
            OptimizerSpec(lr=0.0, weight_decay=math.nan, clip_norm=-1.0, proximal=-2.0), total_steps=1
        )
    with pytest.raises(UnknownName, match="no optimizer 'lion'; have: adamw, sgd"):
        make_optimizer(OptimizerSpec(name="lion"), total_steps=1)
    with pytest.raises(UnknownName, match="no decay 'step'"):
        make_optimizer(OptimizerSpec(decay="step"), total_steps=1)
