import logging

import pytest
from rounds_by_hand import decline, evaluation, federation, give, hello, job, of, report

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.rounds.actions import Assign, Close, Finish
from fleetune.broker.rounds.evaluations import Evaluations
from fleetune.broker.rounds.federation import Federation


def test_an_evaluating_device_that_declines_is_not_waited_for():
    machine = federation(rounds=1, clients=1, min_clients=1)
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.hello(hello("a"), 0.0)
    give(machine, "a", 1)
    assert machine.declined(decline("e", 0), 2.0) == [evaluation("e", 1)]
    assert machine.declined(decline("e", 1), 2.0) == [Finish("1 rounds are done", ("a", "e"))]


def test_evaluation_follows_in_order_and_rounds_do_not_wait_for_it():
    machine = federation(rounds=2)
    assert machine.hello(hello("e", role="evaluate"), 0.0) == [evaluation("e", 0)]
    machine.hello(hello("a"), 0.0)
    machine.hello(hello("b"), 0.0)
    give(machine, "a", 1)
    give(machine, "b", 1)
    give(machine, "a", 2)
    assert give(machine, "b", 2) == [Close(2, 2, ("a", "b"))], "the last evaluation is waited for"
    assert machine.reported(report("e", 0), 2.0) == [evaluation("e", 1)]
    assert machine.reported(report("e", 1), 3.0) == [evaluation("e", 2)]
    assert machine.reported(report("e", 2), 4.0) == [Finish("2 rounds are done", ("a", "b", "e"))]


def test_an_evaluating_device_that_comes_back_goes_on_where_it_was():
    machine = federation()
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.offline("e", 1.0)
    assert machine.hello(hello("e", role="evaluate"), 2.0) == [evaluation("e", 0)]
    assert machine.hello(hello("e", role="evaluate"), 3.0) == [evaluation("e", 0)]


def test_the_last_evaluation_is_waited_for_as_long_as_reports_come(caplog):
    machine = Federation(job(rounds=1, clients=1, min_clients=1), Patience(evaluation_s=10), now=0.0)
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.hello(hello("a"), 0.0)
    give(machine, "a", 1, now=5.0)
    assert machine.tick(14.9) == []
    machine.reported(report("e", 0), 14.9)
    assert machine.tick(24.8) == []
    with caplog.at_level(logging.WARNING):
        assert machine.tick(24.9) == [Finish("1 rounds are done", ("a", "e"))]
    assert "without the last evaluation of e" in caplog.text


def test_only_every_so_many_versions_and_the_last_are_evaluated():
    machine = Federation(job(rounds=3, clients=1, min_clients=1, evaluate_every=2), Patience(), now=0.0)
    versions = [a.task.version for a in machine.hello(hello("e", role="evaluate"), 0.0)]
    machine.hello(hello("a"), 0.0)
    for number in (1, 2, 3):
        give(machine, "a", number)
    while not machine.finished:
        versions += [a.task.version for a in of(Assign, machine.reported(report("e", versions[-1]), 1.0))]
    assert versions == [0, 2, 3]


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (report("e", 5), "version 5 is unknown"),
        (report("x", 0), "not asked to evaluate"),
        (report("e", 0, loss=float("nan")), "not a measurement"),
        (report("e", 0, accuracy=1.5), "not a measurement"),
        (report("e", 0, num_samples=0), "not a measurement"),
    ],
)
def test_a_strange_report_gets_its_reason(strange, said):
    machine = federation()
    machine.hello(hello("e", role="evaluate"), 0.0)
    assert said in machine.evaluations.judge(strange, machine.version)
    assert machine.evaluations.judge(report("e", 0), machine.version) == ""


def evaluations(*reported, every=1):
    found = Evaluations(job(rounds=4, evaluate_every=every), reported)
    found.advance(0, is_last=False)
    return found


def test_a_version_is_complete_when_nobody_here_owes_a_report_on_it():
    found = evaluations()
    assert found.is_complete(0), "nobody is here"
    found.hello("e")
    found.hello("f")
    found.advance(1, is_last=False)
    found.reported(report("e", 0))
    assert (found.is_complete(0), found.num_silent(0), found.silent(0)) == (False, 1, ["f"])
    found.reported(report("f", 0))
    assert (found.is_complete(0), found.is_complete(1)) == (True, False)
    found.reported(report("f", 0))
    found.reported(report("e", 1))
    found.offline("f")
    assert found.is_complete(1), "who is gone is not waited for"
    found.hello("f")
    assert not found.is_complete(1)
    found.declined("f", "evaluate-1-f")
    assert found.is_complete(1)


def test_reports_of_an_earlier_life_count():
    found = evaluations((0, "e"))
    assert found.hello("e") == []
    assert (found.is_complete(0), found.has_reports(0), found.num_silent(0)) == (True, True, 0)
    assert found.advance(1, is_last=False) == [evaluation("e", 1)]


def test_a_version_that_is_not_due_is_complete():
    found = evaluations(every=3)
    found.hello("e")
    found.reported(report("e", 0))
    assert found.advance(1, is_last=False) == []
    assert found.is_complete(1)
    assert found.advance(2, is_last=True) == [evaluation("e", 2)], "the last one always is"
