"""How many samples are behind a run in effect, worked out by hand; each way to let few of them speak is seen."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.work import OptimizerSpec
from fleetune.device_runtime.engine.pulls import Pulls
from fleetune.device_runtime.training.influence import Influence

SGD = OptimizerSpec(name="sgd", lr=1.0)
ALL = np.arange(4)


def pulls(*norms):
    return Pulls(np.array(norms, float), np.ones(len(norms)))


def after(*steps, spec=SGD, layers=1):
    """Effective samples of eight after steps of ``(samples, pulls, rate)``, further arguments by name."""
    found = Influence(spec, num_layers=layers, num_samples=8)
    for samples, pull, rate, *more in steps:
        found.add(np.asarray(samples), pull, **{"trained": range(layers), "rate": rate, **dict(*more)})
    return found.effective


def test_of_samples_that_weigh_alike_all_count_and_twice_counts_once():
    assert after((ALL, pulls(1, 1, 1, 1), 1.0)) == pytest.approx(4)
    assert after((ALL, pulls(1, 1, 1, 1), 1.0), (ALL, pulls(3, 3, 3, 3), 0.1)) == pytest.approx(4)
    assert after((ALL, pulls(1, 1, 1, 1), 1.0), (ALL + 4, pulls(1, 1, 1, 1), 1.0)) == pytest.approx(8)


def test_of_samples_of_which_one_speaks_that_one_counts():
    assert after((ALL, pulls(0, 1, 0, 0), 1.0)) == pytest.approx(1)
    assert after((ALL, pulls(3, 1, 1, 1), 1.0)) == pytest.approx(3), "36 / 12"


def test_no_sample_has_more_than_two_nths_of_the_whole():
    norms = np.array([9.0, *[1.0] * 99])
    found = Influence(SGD, num_layers=1, num_samples=100)
    found.add(np.arange(100), Pulls(norms, norms), trained=[0], rate=1.0)
    assert found.effective == pytest.approx(2 * 108 / 9), "the other measure is 64.8"


def test_a_head_that_sees_few_is_seen_too():
    found = Influence(SGD, num_layers=1, num_samples=4)
    found.add(ALL, Pulls(np.ones(4), np.array([1.0, 0, 0, 0])), trained=[0], rate=1.0)
    assert found.effective == pytest.approx(1)


@pytest.mark.parametrize(
    ("spec", "rates"),
    [
        (SGD, (1e-9, 1.0)),
        (OptimizerSpec(name="sgd", lr=1.0, weight_decay=1.0), (1.0, 1.0)),
        (OptimizerSpec(name="adamw", lr=1.0, weight_decay=1.0), (1.0, 1.0)),
        (OptimizerSpec(name="sgd", lr=1.0, proximal=1.0), (1.0, 1.0)),
    ],
)
def test_steps_that_vanish_do_not_count(spec, rates):
    steps = [(ALL + 4 * i, pulls(1, 1, 1, 1), rate) for i, rate in enumerate(rates)]
    assert after(*steps, spec=spec) == pytest.approx(4)


def test_under_adam_a_step_counts_by_its_gradient_over_those_so_far():
    adam = OptimizerSpec(name="adamw", lr=1.0)
    small, large = pulls(*[1e-6] * 4), pulls(1, 1, 1, 1)
    assert after((ALL, small, 1.0), (ALL + 4, large, 1.0)) == pytest.approx(4, rel=1e-5), "as sgd has it"
    assert after((ALL, small, 1.0), (ALL + 4, large, 1.0), spec=adam) == pytest.approx(7.77, abs=0.01)
    assert after((ALL, large, 1.0), (ALL + 4, small, 1.0), spec=adam) == pytest.approx(4, rel=1e-5)


def test_a_clipped_step_counts_as_clipped():
    steps = [(ALL, pulls(1, 1, 1, 1), 1.0, {"clip": 1e-9}), (ALL + 4, pulls(1, 1, 1, 1), 1.0)]
    head_and_body = Influence(SGD, num_layers=1, num_samples=8)
    for samples, pull, rate, *more in steps:
        head_and_body.add(samples, pull, trained=[0], rate=rate, **dict(*more))
    assert head_and_body.effective == pytest.approx(4)


def test_the_layer_that_learns_of_the_fewest_counts():
    steps = [(ALL, pulls(1, 1, 1, 1), 1.0), (ALL + 4, pulls(1, 1, 1, 1), 1.0, {"trained": [1]})]
    assert after(*steps, layers=2) == pytest.approx(4)


def test_rows_that_a_gate_keeps_from_a_layer_do_not_count_there():
    gates = np.array([[True, False, False, True]])
    assert after((ALL, pulls(1, 1, 1, 1), 1.0, {"gates": gates})) == pytest.approx(2)


def test_without_a_measure_all_rows_of_a_step_weigh_alike():
    assert after((ALL, None, 1.0)) == pytest.approx(4)


@pytest.mark.parametrize("rate", [np.inf, np.nan, 1e300])
def test_what_no_float_holds_is_of_nobody(rate):
    assert after((ALL, pulls(1, 1, 1, 1e300), rate)) == 0
    assert after() == 0


def test_it_goes_on_from_its_columns_and_names_what_is_wrong_with_them():
    first, then = (Influence(OptimizerSpec(), num_layers=1, num_samples=8) for _ in range(2))
    first.add(ALL, pulls(1, 2, 3, 4), trained=[0], rate=1.0)
    then.restore(first.columns())
    for one in (first, then):
        one.add(ALL + 4, pulls(4, 3, 2, 1), trained=[0], rate=1.0)
    assert first.effective == then.effective
    assert then.problems({}) == [], "checkpoints of earlier releases have none"
    assert then.problems({"sums": np.zeros((2, 8))}) == ["moments: missing"]
    bad = {**first.columns(), "sums": np.full((2, 8), np.nan)}
    assert then.problems(bad) == ["sums: negative or NaN"]
