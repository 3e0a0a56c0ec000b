"""Epsilon against the library's other accountants and known figures; the budget at its border."""

import sys

import pytest

from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.methods.accounting import epsilon_of, rounds_within, spending_of
from fleetune.device_runtime.contracts.accounting import Steps, epsilon_of_steps
from fleetune.device_runtime.contracts.fields import COUNT_MAX
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError


def central(**changes):
    return Privacy(**{"name": "central", "clip": 1.0, "noise": 1.0, **changes})


@pytest.mark.parametrize(
    ("noise", "epsilon"),
    [(3.730631634815942, 1.0), (1.390593456674534, 3.0), (0.6002290721989517, 8.0)],
)
def test_known_figures_of_one_gaussian_mechanism(noise, epsilon):
    """3.7306 is also what Balle and Wang's own code gives for epsilon 1 and delta 1e-5."""
    assert epsilon_of(central(noise=noise), 1) == pytest.approx(epsilon, abs=1e-6)


@pytest.mark.parametrize(("noise", "rounds"), [(0.7, 1), (1.0, 2), (4.0, 30), (20.0, 400)])
def test_rounds_compose_as_the_library_has_it(noise, rounds):
    import dp_accounting as library

    found = epsilon_of(central(noise=noise), rounds)
    relation, event = library.NeighboringRelation.REPLACE_SPECIAL, library.GaussianDpEvent(noise)
    exact, renyi = (
        library.pld.PLDAccountant(relation),
        library.rdp.RdpAccountant(neighboring_relation=relation),
    )
    for accountant in (exact, renyi):
        accountant.compose(event, rounds)
    assert found == pytest.approx(exact.get_epsilon(1e-5), rel=1e-4)
    assert found < renyi.get_epsilon(1e-5)


def test_it_never_falls_with_rounds_nor_rises_with_noise():
    by_rounds = [epsilon_of(central(), rounds) for rounds in range(50)]
    assert by_rounds[0] == 0
    assert by_rounds == sorted(by_rounds)
    by_noise = [epsilon_of(central(noise=2.0**i), 3) for i in range(-6, 7)]
    assert by_noise == sorted(by_noise, reverse=True)


@pytest.mark.parametrize("most", [1.0, 3.0, 7.0, 8.0, 100.0])
@pytest.mark.parametrize("noise", [0.5, 1.0, 6.0, 50.0])
def test_as_many_rounds_as_the_limit_allows_and_no_more(most, noise):
    privacy = central(noise=noise, most_epsilon=most)
    rounds = rounds_within(privacy)
    assert epsilon_of(privacy, rounds) <= most < epsilon_of(privacy, rounds + 1)


def test_extremes_end():
    assert rounds_within(central(noise=1e-6, most_epsilon=1.0)) == 0
    assert rounds_within(central(noise=1e6, most_epsilon=1e6)) == COUNT_MAX
    assert epsilon_of(central(noise=1e-6, delta=1e-300), COUNT_MAX) > 1e12


def test_of_samples_the_steps_of_all_rounds_count():
    privacy = Privacy(name="sample", clip=1.0, noise=1.1, sample_rate=0.01)
    work = LocalWork(steps=1000)
    assert epsilon_of(privacy, 0, work) == 0
    assert epsilon_of(privacy, 10, work) == epsilon_of_steps([Steps(1.1, 0.01, 10_000)], 1e-5)
    assert spending_of(privacy, work)(3) == epsilon_of(privacy, 3, work)
    limited = Privacy(name="sample", clip=1.0, noise=1.1, sample_rate=0.01, most_epsilon=4.0)
    rounds = rounds_within(limited, work)
    assert epsilon_of(limited, rounds, work) <= 4.0 < epsilon_of(limited, rounds + 1, work)


def test_without_noise_or_limit_nothing_is_counted():
    assert epsilon_of(Privacy(), 5) is None
    assert spending_of(Privacy()) is None
    assert rounds_within(Privacy()) is None
    assert rounds_within(central()) is None


def test_the_library_that_is_missing_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[privacy\]'"):
        epsilon_of(central(noise=1.2345678), 1)
