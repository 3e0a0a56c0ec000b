"""A job that ends when epsilon would exceed its most; one round of these devices is epsilon 4.38, two 6.57, three 8.46."""

import pytest
from rounds_by_hand import decline, give, hello, job, of, past

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.rounds.actions import Close, Enrol, Finish
from fleetune.broker.rounds.budget import Budget
from fleetune.broker.rounds.federation import Federation

PATIENCE = Patience(deadline_s=100, gather_s=30)


def private(past=None, *, most=7.0, turns=None, **changes):
    dp = Privacy(name="central", clip=1.0, noise=1.0, most_epsilon=most)
    settings = job(dp=dp, **{"rounds": 9, **changes})
    return Federation(settings, PATIENCE, now=0.0, past=past, turns=turns or {})


def here(machine, *devices, now=0.0):
    return [action for device in devices for action in machine.hello(hello(device), now)]


def asked_in(actions):
    return [task.device_id for enrol in of(Enrol, actions) for task in enrol.tasks]


def test_the_job_ends_in_words_before_the_round_that_would_exceed_it():
    machine = private()
    here(machine, "a", "b")
    for number in (1, 2):
        give(machine, "a", number)
        actions = give(machine, "b", number)
    assert of(Close, actions) == [Close(2, 2, ("a", "b"))]
    assert actions == of(Close, actions), "others may be on their way"
    assert machine.due_at() == 30.0
    (finish,) = of(Finish, machine.tick(30.0))
    assert finish.reason == (
        "2 rounds are done; 0 devices may be asked again, and a round needs 2: with another, epsilon would exceed 7"
    )
    assert machine.finished


def test_without_a_most_it_goes_on():
    machine = private(most=0.0)
    here(machine, "a", "b")
    for number in range(1, 10):
        give(machine, "a", number)
        actions = give(machine, "b", number)
    assert of(Finish, actions)[0].reason == "9 rounds are done"


def test_who_was_asked_as_often_as_may_be_is_left_out_and_the_others_go_on():
    machine = private(most=4.4)
    here(machine, "a", "b")
    give(machine, "a", 1)
    here(machine, "c", "d", now=1.0)
    assert asked_in(give(machine, "b", 1)) == ["c", "d"]
    assert not machine.finished


def test_a_device_that_comes_back_with_nothing_left_is_not_asked_in_the_place_of_another():
    machine = private(most=4.4, min_clients=1)
    here(machine, "a", "b")
    machine.offline("a", 1.0)
    here(machine, "c", "d", now=1.0)
    give(machine, "b", 1)
    machine.tick(100.0)
    assert machine.round == 2
    here(machine, "a", now=101.0)
    machine.declined(decline("c", 2), 102.0)
    assert asked_in(machine.declined(decline("d", 2), 103.0)) == []


def test_a_declined_round_costs_nothing():
    machine = private(most=4.4, min_clients=1)
    here(machine, "a", "b")
    machine.declined(decline("a", 1), 1.0)
    assert asked_in(give(machine, "b", 1)) == ["a"]


def test_a_restart_goes_on_counting_and_waits_for_devices_that_it_does_not_know():
    machine = private(past(3, version=2, closed=2), turns={"a": 2, "b": 2})
    assert here(machine, "a", "b", now=1.0) == []
    assert not machine.finished
    assert machine.due_at() == 30.0
    assert asked_in(here(machine, "c", "d", now=2.0)) == ["c", "d"]

    machine = private(past(3, version=2, closed=2), turns={"a": 2, "b": 2})
    here(machine, "a", "c", now=1.0)
    assert of(Finish, machine.tick(29.0)) == []
    (finish,) = of(Finish, machine.tick(30.0))
    assert "1 devices may be asked again, and a round needs 2" in finish.reason


def test_a_restart_in_the_last_round_that_may_be_lets_it_end():
    open_round = past(2, "a", "b", accepted=[(2, "a")])
    machine = private(open_round, turns={"a": 2, "b": 2})
    here(machine, "a", "b", now=50.0)
    assert of(Close, give(machine, "b", 2))
    assert of(Finish, machine.tick(50.0))


def test_a_budget_counts_both_ways():
    budget = Budget(1, {"a": 1})
    budget.see("b")
    assert (budget.num_spent, budget.num_left) == (1, 1)
    budget.take("b")
    assert (budget.num_spent, budget.num_left) == (2, 0)
    budget.take("b", -1)
    assert (budget.is_spent("a"), budget.is_spent("b")) == (True, False)
    assert (budget.num_spent, budget.num_left) == (1, 1)
    assert not Budget(None, {"a": 99}).is_spent("a")


@pytest.mark.parametrize("turns", [{}, {"a": 5}])
def test_a_job_without_noise_has_no_budget(turns):
    machine = Federation(job(), PATIENCE, now=0.0, turns=turns)
    assert asked_in(here(machine, "a", "b")) == ["a", "b"]
