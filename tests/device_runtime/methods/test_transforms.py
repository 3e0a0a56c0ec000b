"""The links by hand, and what holds for each: a new one is one line in LINKS."""

import inspect

import numpy as np
import pytest

from fleetune.device_runtime.arrays import load_arrays, save_arrays
from fleetune.device_runtime.methods import transforms
from fleetune.device_runtime.methods.optim import applied
from fleetune.device_runtime.methods.transforms import (
    IDENTITY,
    Transform,
    adam,
    chain,
    clip_by_norm,
    decay_weights,
    descend,
    mask,
    momentum,
    proximal,
    regularise,
)

LINKS = {
    "clip_by_norm": clip_by_norm(1.0),
    "regularise": regularise(lambda param: np.float32(0.1) * np.sign(param)),
    "decay_weights": decay_weights(0.1),
    "proximal": proximal(0.5),
    "mask": mask({"b": np.eye(3) == 1}),
    "momentum": momentum(0.9),
    "adam": adam(),
    "descend": descend(lambda step: 0.1 / (step + 1)),
}
OFF = [clip_by_norm(0.0), decay_weights(0.0), proximal(0.0), momentum(0.0), chain()]
SHAPES = {"a": (4,), "b": (3, 3), "c": (2, 5)}
NUM_STEPS = 8

every_link = pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)


def values(seed):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def gradients(step):
    """Tensor ``a`` has none in every other step."""
    return {name: grad for name, grad in values(50 + step).items() if name != "a" or step % 2}


def copied(arrays):
    return {name: array.copy() for name, array in arrays.items()}


def equal(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def floats(*numbers):
    return np.array(numbers, np.float32)


def run(link, steps, params, state):
    optimizer = applied(link)
    for step in steps:
        params, state = optimizer.update(gradients(step), state, params)
    return params, state


def test_every_link_is_here():
    made = {
        n: f
        for n, f in inspect.getmembers(transforms, inspect.isfunction)
        if f.__module__ == transforms.__name__
    }
    factories = {n for n, f in made.items() if inspect.signature(f).return_annotation is Transform}
    assert factories == {*LINKS, "chain"}


@every_link
def test_a_link_writes_to_nothing_it_is_given(link):
    params, state = values(0), link.init(values(0))
    for step in range(3):
        grads = gradients(step)
        before = [copied(x) for x in (grads, state, params)]
        updates, entries = link.update(grads, state, params)
        for name in updates:  # nor is what it gives a view of what it got, if it changed it
            if updates[name] is not grads[name]:
                updates[name] += 1
        assert all(equal(x, y) for x, y in zip(before, (grads, state, params), strict=True))
        state = {**state, **entries}


@every_link
def test_a_link_gives_what_it_got_by_name_shape_and_dtype(link):
    for step in (0, 1):
        updates, _ = link.update(gradients(step), link.init(values(0)), values(0))
        assert {n: (v.shape, v.dtype) for n, v in updates.items()} == {
            n: (v.shape, v.dtype) for n, v in gradients(step).items()
        }


@every_link
def test_a_link_keeps_state_in_its_own_slots_and_none_for_what_has_no_gradient(link):
    entries = link.update({"b": values(1)["b"]}, link.init(values(0)), values(0))[1]
    assert {name.partition("/")[0] for name in entries} <= {*link.slots}
    assert {name.partition("/")[2] for name in entries} <= {"", "b"}
    assert {name.partition("/")[0] for name in link.init(values(0))} <= {*link.slots}


@every_link
def test_a_link_goes_on_from_a_file_to_the_bit(link, tmp_path):
    straight, _ = run(link, range(NUM_STEPS), values(0), link.init(values(0)))
    params, state = run(link, range(3), values(0), link.init(values(0)))
    save_arrays(tmp_path / "state.safetensors", {**state, "some": np.zeros(1)})
    resumed, _ = run(link, range(3, NUM_STEPS), params, load_arrays(tmp_path / "state.safetensors"))
    assert equal(straight, resumed)


@pytest.mark.parametrize("link", OFF)
def test_a_link_of_strength_zero_changes_nothing(link):
    assert link.slots == IDENTITY.slots == ()
    assert link.init(values(0)) == {}
    updates, entries = link.update(gradients(1), {}, values(0))
    assert equal(updates, gradients(1))
    assert entries == {}


@pytest.mark.parametrize("last", [mask({"b": np.eye(3)}), descend(lambda step: 0.5)])
def test_a_chain_is_its_links_one_after_the_other(last):
    first = adam()
    both = chain(first, last)
    state, params = both.init(values(0)), values(0)
    assert both.slots == first.slots + last.slots
    for step in range(3):
        between, one = first.update(gradients(step), state, params)
        want, two = last.update(between, state, params)
        got, entries = both.update(gradients(step), state, params)
        assert equal(got, want)
        assert equal(entries, {**one, **two})
        state = {**state, **entries}


def test_two_links_with_one_slot_are_refused():
    with pytest.raises(ValueError, match="more than one link keeps momentum, steps, m, v; name"):
        chain(momentum(0.9), adam(), chain(momentum(0.5), adam()))


def test_clipping_by_hand():
    """Norm of (3, 4) is 5: at most 1 leaves (0.6, 0.8); at most 10 leaves it as it is."""
    grads = {"a": floats(3.0), "b": floats(4.0)}
    clipped = clip_by_norm(1.0).update(grads, {}, {})[0]
    assert (clipped["a"][0], clipped["b"][0]) == pytest.approx((0.6, 0.8), rel=1e-6)
    assert clip_by_norm(10.0).update(grads, {}, {})[0] == grads
    assert clip_by_norm(1.0).update({}, {}, {})[0] == {}


def test_momentum_by_hand():
    """Gradient 1 twice at momentum 0.5 and rate 1: steps of 1 and 1.5."""
    optimizer = applied(chain(momentum(0.5), descend(lambda step: 1.0)))
    params = {"w": floats(0.0)}
    state = optimizer.init(params)
    for _ in range(2):
        params, state = optimizer.update({"w": floats(1.0)}, state, params)
    assert params["w"][0] == -2.5


def test_a_proximal_term_by_hand():
    """From 1, gradient 1, rate 1/2, mu 1/2: 1 - 1/2 = 1/2, then 1/2 - (1 - 1/4) / 2 = 1/8; without it 0."""
    optimizer = applied(chain(proximal(0.5), descend(lambda step: 0.5)))
    params = {"w": floats(1.0)}
    state, seen = optimizer.init(params), []
    for _ in range(2):
        params, state = optimizer.update({"w": floats(1.0)}, state, params)
        seen.append(float(params["w"][0]))
    assert seen == [0.5, 0.125]


def test_a_penalty_by_hand():
    """|w| at strength 2: its slope is 2 or -2."""
    updates, _ = regularise(lambda w: 2 * np.sign(w)).update(
        {"w": floats(1.0, 1.0)}, {}, {"w": floats(3.0, -0.1)}
    )
    assert updates["w"].tolist() == [3.0, -1.0]


def test_a_mask_hides_gradients_first_and_freezes_entries_last():
    """Weight decay at 1/2 and rate 1 from w = 2, gradient 1: the hidden entry decays to 1, the frozen one stays."""
    half, rest = {"w": np.array([1, 0])}, (decay_weights(0.5), descend(lambda step: 1.0))
    params = {"w": floats(2.0, 2.0)}
    ends = []
    for link in (chain(mask(half), *rest), chain(*rest, mask(half))):
        optimizer = applied(link)
        ends.append(
            optimizer.update({"w": floats(1.0, 1.0)}, optimizer.init(params), params)[0]["w"].tolist()
        )
    assert ends == [[0.0, 1.0], [0.0, 2.0]]


def test_masks_that_fit_nothing_are_all_listed():
    with pytest.raises(ValueError, match=r"mask: a: \(3,\) for \(4,\); z: \(1,\) for no tensor"):
        mask({"a": np.ones(3), "z": np.ones(1)}).init(values(0))
