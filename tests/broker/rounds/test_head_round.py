"""The round for the head: it asks everybody, teaches no configurator, and shifts no draw of the rounds that train."""

from math import inf

import pytest
from rounds_by_hand import decline, federation, give, hello, job, of, update

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.configurators import CONFIGURATORS, Choice, Configurator
from fleetune.broker.rounds.actions import Assign, Close, Enrol, Finish
from fleetune.broker.rounds.barrier import Barrier
from fleetune.broker.store.store import Past
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import TransportError

SUMS = "xor"
"""The codec of class sums."""
HEAD = {"head_start": "class-mean", "rounds": 3, "min_clients": 1}


def machine(**changes):
    return federation(**{**HEAD, **changes})


def asked(actions):
    return [task.device_id for enrol in of(Enrol, actions) for task in enrol.tasks]


def opened(**changes):
    """Five devices here before the round opens, of which rounds that train ask two."""
    found = machine(clients=5, **changes)
    for name in "abcde":
        actions = found.hello(hello(name), 1.0)
    return found, actions


def test_every_device_is_asked_and_those_that_come_while_it_is_open():
    found = machine(clients=2)
    found.hello(hello("a"), 1.0)
    actions = found.hello(hello("b"), 1.0)
    assert asked(actions) == ["a", "b"]
    assert {task.work.learns for enrol in of(Enrol, actions) for task in enrol.tasks} == {"class-means"}
    assert asked(found.hello(hello("c"), 2.0)) == ["c"]
    assert asked(found.hello(hello("c"), 3.0)) == [], "once"
    give(found, "a", 1, codec=SUMS)
    give(found, "b", 1, codec=SUMS)
    assert asked(found.hello(hello("d"), 4.0)) == ["d"], "though as many as clients have answered"
    for name in "cd":
        actions = give(found, name, 1, codec=SUMS)
    assert of(Close, actions) == [Close(1, 1, ("a", "b", "c", "d"))]
    assert len(asked(actions)) == 2, "the next round trains, with as many as clients"
    assert {task.work.learns for enrol in of(Enrol, actions) for task in enrol.tasks} == {"adapter"}


def test_it_is_exact_whatever_the_codec_of_the_job():
    work = device_work(
        job(**HEAD, work=LocalWork(codec="topk", codec_ratio=0.1, codec_bits=16)), round_number=1, position=0
    )
    assert (work.codec, work.codec_ratio, work.codec_bits) == (SUMS, 0.0, 0)


def test_those_who_decline_are_not_waited_for():
    found, _ = opened()
    for name in "abcd":
        assert of(Close, found.declined(decline(name, 1), 2.0)) == []
    assert of(Close, give(found, "e", 1, codec=SUMS)) == [Close(1, 1, ("e",))]


def test_those_who_are_late_are_left_behind_at_the_deadline():
    found, _ = opened(patience=Patience(deadline_s=100, gather_s=30))
    give(found, "b", 1, codec=SUMS)
    assert of(Close, found.tick(101.0)) == [Close(1, 1, ("b",), lost=("a", "c", "d", "e"))]


def test_where_nobody_can_the_job_stops():
    found, _ = opened(patience=Patience(deadline_s=100, extensions_max=0))
    for name in "abcde":
        found.declined(decline(name, 1), 2.0)
    with pytest.raises(TransportError, match="0 of at least 1 updates"):
        found.tick(101.0)


def test_after_a_restart_the_same_are_asked_and_those_who_answered_are_not():
    _, actions = opened()
    tasks = of(Enrol, actions)[0].tasks
    again = machine(clients=5, past=Past(tasks=tasks, accepted={tasks[1].task_id: "d-b"}))
    offers = [of(Assign, again.hello(hello(name), 1.0)) for name in "abcde"]
    assert [bool(offer) for offer in offers] == [True, False, True, True, True]
    assert offers[0][0].task == tasks[0]


def test_the_rounds_that_train_draw_as_those_of_a_job_without():
    plain, headed = job(seed=7), job(seed=7, head_start="class-mean")
    for number in (1, 2, 3):
        for position in (0, 1):
            wanted = device_work(plain, round_number=number, position=position)
            assert device_work(headed, round_number=number + 1, position=position) == wanted


def test_one_round_is_the_head_alone():
    found = machine(clients=1, rounds=1)
    found.hello(hello("a"), 1.0)
    actions = give(found, "a", 1, codec=SUMS)
    assert of(Close, actions) == [Close(1, 1, ("a",))]
    assert of(Finish, actions)
    assert found.due_at() == inf


def test_no_configurator_is_asked_or_taught(monkeypatch):
    asked, learned = [], []

    def choose(state, candidate):
        asked.append(candidate.round)
        return Choice(LocalWork())

    watching = Configurator(
        lambda settings: None, choose, lambda state, outcome: learned.append(outcome.work.learns)
    )
    monkeypatch.setitem(CONFIGURATORS, "fixed", lambda: watching)
    found = machine(clients=2)
    found.hello(hello("a"), 1.0)
    found.hello(hello("b"), 1.0)
    found.declined(decline("b", 1), 2.0)
    give(found, "a", 1, codec=SUMS)
    give(found, "a", 2)
    give(found, "b", 2)
    assert (asked, learned) == ([2, 2, 3, 3], ["adapter", "adapter"])
    outcomes = [Outcome("a", LocalWork(learns=kind), {}) for kind in ("class-means", "adapter")]
    learned.clear()
    Barrier(job(**HEAD), Patience(), now=0.0, past=Past(), outcomes=outcomes)
    assert learned == ["adapter"]


def test_an_update_of_the_head_is_for_that_round_alone():
    found, _ = opened()
    give(found, "a", 1, codec=SUMS)
    late = update("a", 2)
    assert "round 2 is unknown" in found.judge(late).reason
