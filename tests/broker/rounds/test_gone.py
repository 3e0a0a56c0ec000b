"""Devices that vanish, or decline, while a round is open: who is waited for, how long, and what is done without them."""

from math import inf

import msgspec
import pytest
from rounds_by_hand import asked, decline, federation, give, hello, job, of, opened, past, task, update
from steps import calls_of

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.rounds.actions import Assign, Close, Enrol
from fleetune.broker.rounds.federation import Federation
from fleetune.broker.store.store import Past
from fleetune.broker.tasks import Declined
from fleetune.device_runtime.errors import ConfigError, TransportError

PATIENT = Patience(deadline_s=600, gather_s=30, grace_s=10)
FEW = "least_samples: 4 asked for, 100 at least"


def of_three(**changes):
    machine, _ = opened("a", "b", "c", patience=PATIENT, **{"min_clients": 2, **changes})
    return machine


def decline_with(device, number, reason, **changes):
    return msgspec.structs.replace(decline(device, number, cause="work", **changes), reason=reason)


def test_a_round_that_has_enough_goes_on_a_grace_after_a_device_is_gone(caplog):
    machine = of_three()
    machine.offline("c", 2.0)
    give(machine, "a", 1, now=3.0)
    assert give(machine, "b", 1, now=4.0) == []
    assert machine.due_at() == 12.0
    assert machine.tick(11.9) == []
    assert machine.tick(12.0)[0] == Close(1, 1, ("a", "b"), lost=("c",))
    assert "round 1 goes on without c: gone" in caplog.text


def test_it_goes_on_at_once_where_that_is_long_ago_or_there_is_no_grace():
    machine = of_three()
    machine.offline("c", 2.0)
    give(machine, "a", 1, now=3.0)
    assert give(machine, "b", 1, now=50.0)[0] == Close(1, 1, ("a", "b"), lost=("c",))
    machine, _ = opened("a", "b", "c", patience=Patience(grace_s=0), min_clients=2)
    give(machine, "a", 1)
    give(machine, "b", 1)
    assert machine.offline("c", 2.0)[0] == Close(1, 1, ("a", "b"), lost=("c",))


def test_who_lives_is_waited_for_until_the_deadline():
    machine = of_three()
    machine.offline("c", 2.0)
    give(machine, "a", 1, now=3.0)
    assert machine.due_at() == 12.0
    assert machine.tick(12.0) == []
    assert machine.due_at() == 601.0, "there is nothing to do before, and no turn is spent on it"
    assert machine.tick(600.9) == []
    assert machine.declined(decline("b", 1), 600.9) == [], "one update is too few"


def test_who_is_back_within_the_grace_counts():
    machine = of_three()
    machine.offline("c", 2.0)
    give(machine, "a", 1, now=3.0)
    give(machine, "b", 1, now=4.0)
    assert machine.hello(hello("c"), 11.0) == [Assign(task("c", 1, 2), 590.0)]
    assert machine.tick(100.0) == []
    assert give(machine, "c", 1, now=101.0)[0] == Close(1, 1, ("a", "b", "c"))


def test_a_word_of_it_is_enough():
    machine = of_three()
    machine.offline("c", 2.0)
    give(machine, "a", 1, now=3.0)
    give(machine, "b", 1, now=4.0)
    machine.rounds.hear("c")
    assert machine.due_at() == 601.0
    assert machine.tick(100.0) == []


def test_the_grace_is_of_who_went_last_and_a_second_goodbye_does_not_renew_it():
    machine = of_three(min_clients=1)
    give(machine, "a", 1)
    machine.offline("b", 2.0)
    machine.offline("c", 5.0)
    machine.offline("c", 9.0)
    assert machine.due_at() == 15.0
    assert machine.tick(15.0)[0] == Close(1, 1, ("a",), lost=("b", "c"))


def test_who_is_late_is_told_that_the_round_is_closed():
    machine = of_three()
    machine.offline("c", 2.0)
    give(machine, "a", 1)
    give(machine, "b", 1, now=20.0)
    assert machine.judge(update("c", 1)).reason == "round 1 is closed"


def test_a_round_that_has_too_few_asks_others_after_the_grace_and_else_waits_as_ever():
    machine = federation(patience=PATIENT)
    for name in ("a", "b"):
        machine.hello(hello(name), 1.0)
    give(machine, "a", 1)
    machine.offline("b", 2.0)
    assert machine.tick(12.0) == []
    assert machine.due_at() == 601.0
    assert machine.hello(hello("c"), 20.0) == asked(1, "c", first=2, deadline_s=581.0)
    machine.hello(hello("b"), 21.0)
    assert give(machine, "b", 1, now=22.0) == [], "both count, and c lives"
    assert give(machine, "c", 1, now=23.0)[0] == Close(1, 1, ("a", "b", "c"))


def test_a_restart_waits_for_all_until_it_hears_that_they_are_gone():
    machine = federation(past(1, "a", "b", accepted=[(1, "a")]), patience=PATIENT, min_clients=1)
    assert machine.tick(50.0) == []
    assert machine.offline("b", 60.0) == []
    assert machine.tick(70.0)[0] == Close(1, 1, ("a",), lost=("b",))


def test_when_all_decline_for_good_the_job_ends_at_once_and_says_why():
    machine, _ = opened("a", "b", "c", patience=PATIENT)
    give(machine, "a", 1)
    for name in "bc":
        machine.declined(decline_with(name, 1, FEW), 2.0)
    assert machine.due_at() == -inf
    said = rf"round 1: 1 of at least 3 updates, and declined by b, c: {FEW}; where that has changed the same command"
    with pytest.raises(ConfigError, match=said):
        machine.tick(2.0)


def test_as_long_as_one_is_at_work_or_enough_are_there_it_goes_on():
    machine, _ = opened("a", "b", "c", patience=PATIENT, min_clients=1)
    for name in "bc":
        machine.declined(decline_with(name, 1, FEW), 2.0)
    assert machine.tick(3.0) == []
    assert give(machine, "a", 1)[0] == Close(1, 1, ("a",))


def test_what_passes_is_waited_for_and_named_at_the_end():
    machine, _ = opened("a", patience=Patience(deadline_s=100, extensions_max=0))
    machine.declined(decline("a", 1), 2.0)
    assert machine.due_at() == 101.0
    with pytest.raises(
        TransportError, match=r"0 of at least 1 updates .*; declined: a: no; the same command"
    ):
        machine.tick(101.0)


def test_a_device_that_is_known_and_was_not_asked_may_come_back():
    machine = federation(patience=PATIENT, clients=1, min_clients=1)
    machine.hello(hello("a"), 1.0)
    machine.hello(hello("b"), 1.0)
    machine.offline("b", 1.5)
    assert machine.declined(decline_with("a", 1, FEW), 2.0) == []
    assert machine.due_at() == 601.0
    assert FEW in machine.rounds.declined_by(), "the operator is told what it waits for"
    assert [t.device_id for t in of(Enrol, machine.hello(hello("b"), 3.0))[0].tasks] == ["b"]


def test_a_start_after_that_end_asks_them_again():
    tasks = tuple(task(name, 1, i) for i, name in enumerate("ab"))
    declined = {tasks[1].task_id: Declined("work", FEW)}
    before = Past(tasks=tasks, accepted={tasks[0].task_id: "d"}, declined=declined)
    machine = Federation(job(), PATIENT, now=0.0, past=before)
    assert machine.tick(0.0) == []
    (enrol, *_) = machine.hello(hello("b"), 1.0)
    assert [(t.device_id, t.task_id, t.position) for t in enrol.tasks] == [("b", "train-1-b-2", 2)]
    machine.declined(decline_with("b", 1, FEW, task_id="train-1-b-2"), 2.0)
    with pytest.raises(ConfigError, match="declined by b: least_samples"):
        machine.tick(2.0)


def test_a_restart_in_the_middle_remembers_what_they_said():
    tasks = tuple(task(name, 1, i) for i, name in enumerate("ab"))
    before = Past(tasks=tasks, declined={tasks[0].task_id: Declined("work", FEW)})
    machine = Federation(job(), PATIENT, now=0.0, past=before)
    machine.hello(hello("a"), 1.0)
    machine.declined(decline_with("b", 1, "policies: asked for suffix"), 2.0)
    with pytest.raises(ConfigError, match=f"declined by a: {FEW}; b: policies: asked for suffix"):
        machine.tick(2.0)


class Name(str):
    """Looking it up, and sorting it, is a call that is counted."""

    __slots__ = ()

    def __hash__(self):
        return str.__hash__(self)

    def __eq__(self, other):
        return str.__eq__(self, other)

    def __lt__(self, other):
        return str.__lt__(self, other)


def calls_in_a_fleet(size):
    """Of one event each, with ``size`` devices here: gathering, at work, gone and back, an update."""
    names = [Name(f"d{n}") for n in range(size)]
    machine = federation(patience=PATIENT, clients=size, min_clients=size - 1)
    for name in names[:-1]:
        machine.hello(hello(name), 0.0)
    found = [calls_of(lambda: (machine.hello(hello("d0"), 0.0), machine.tick(0.0), machine.due_at()))]
    machine.hello(hello(names[-1]), 0.0)
    found.append(calls_of(lambda: (machine.hello(hello("d0"), 1.0), machine.due_at())))
    found.append(calls_of(lambda: (machine.offline("d0", 1.0), machine.due_at(), machine.tick(1.0))))
    found.append(calls_of(lambda: machine.hello(hello("d0"), 1.0)))
    return [*found, calls_of(lambda: give(machine, "d0", 1))]


def test_an_event_costs_the_same_in_a_fleet_of_any_size():
    assert calls_in_a_fleet(400) == calls_in_a_fleet(20)


def test_who_does_not_answer_is_gone_since_it_was_asked_and_not_in_the_next_round():
    machine = of_three()
    give(machine, "a", 1, now=3.0)
    give(machine, "b", 1, now=4.0)
    assert machine.silent("c", 5.0, 14.0) == []
    assert machine.due_at() == 15.0
    close, enrol, *_ = machine.tick(15.0)
    assert close == Close(1, 1, ("a", "b"), lost=("c",))
    assert [one.device_id for one in enrol.tasks] == ["a", "b"]


def test_what_was_long_ago_shortens_nobody_elses_grace():
    machine = of_three(min_clients=1)
    give(machine, "a", 1, now=3.0)
    machine.offline("b", 12.0)
    assert machine.silent("c", 2.0, 12.5) == []
    assert machine.due_at() == 22.0


def test_who_is_heard_is_waited_for_again_and_asked_in_the_next_round():
    machine = of_three()
    give(machine, "a", 1, now=3.0)
    give(machine, "b", 1, now=4.0)
    machine.silent("c", 5.0, 14.0)
    machine.rounds.hear("c")
    assert machine.due_at() == 601.0
    close, enrol, *_ = give(machine, "c", 1, now=20.0)
    assert close == Close(1, 1, ("a", "b", "c"), lost=())
    assert [one.device_id for one in enrol.tasks] == ["a", "b", "c"]
