import numpy as np
import pytest

from fleetune.device_runtime.training.importance import Importance

ADAPTERS = (frozenset({"0.a", "0.b"}), frozenset({"1.a"}), frozenset())
GRADS = {
    "0.a": np.array([3.0, 0.0], np.float32),
    "0.b": np.array([[0.0, 4.0]], np.float32),
    "1.a": np.full(4, 0.5, np.float32),
    "head": np.full(9, 100.0, np.float32),
}


def test_it_is_the_mean_norm_over_the_steps_that_trained_a_layer():
    """Layer 1 is trained in half of the steps, and is not punished for it."""
    importance = Importance(ADAPTERS)
    assert importance.values == (0.0, 0.0, 0.0)
    for step in range(10):
        importance.add(GRADS, (0, 1) if step % 2 else (0,))
    assert importance.values == (5.0, 1.0, 0.0)


def test_a_tensor_without_a_gradient_counts_for_nothing():
    importance = Importance(ADAPTERS)
    importance.add({"0.b": GRADS["0.b"]}, (0, 2))
    assert importance.values == (4.0, 0.0, 0.0)


def test_norms_are_summed_in_float64():
    importance = Importance((frozenset({"a"}),))
    large = np.full(1000, 1e30, np.float32)  # its square is beyond float32
    importance.add({"a": large}, (0,))
    assert importance.values[0] == pytest.approx(1000**0.5 * 1e30, rel=1e-6)


def test_it_goes_on_from_its_columns_to_the_bit():
    straight, cut = Importance(ADAPTERS), Importance(ADAPTERS)
    for importance in (straight, cut):
        importance.add(GRADS, (0,))
    again = Importance(ADAPTERS)
    assert again.problems(cut.columns()) == []
    again.restore(cut.columns())
    for importance in (straight, again):
        importance.add(GRADS, (0, 1))
    assert again.values == straight.values
    assert cut.values == (5.0, 0.0, 0.0), "what was restored from is not written to"


def test_a_checkpoint_of_before_has_none_and_begins_at_zero():
    importance = Importance(ADAPTERS)
    importance.add(GRADS, (0,))
    assert importance.problems({}) == []
    importance.restore({})
    assert importance.values == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"norms": np.zeros(2)}, "norms: expected"),
        ({"steps": np.zeros(3)}, "steps: expected"),
        ({"norms": np.array([1.0, np.nan, 0.0])}, "norms: negative or not finite"),
        ({"steps": np.array([1, -1, 0])}, "steps: negative"),
    ],
)
def test_columns_of_another_run_are_told(change, said):
    importance = Importance(ADAPTERS)
    (problem,) = importance.problems({**importance.columns(), **change})
    assert problem.startswith(said)
