import json
import logging
from math import inf

import msgspec
import pytest
from paths import DATA
from rounds_by_hand import (
    asked,
    decline,
    evaluation,
    federation,
    give,
    hello,
    job,
    of,
    opened,
    past,
    report,
    task,
    update,
)

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.rounds.actions import Assign, Close, Dismiss, Enrol, Finish
from fleetune.broker.rounds.federation import Federation, cause_of, verdict_on
from fleetune.broker.rounds.open_round import Standing
from fleetune.broker.store.store import Past
from fleetune.broker.tasks import Declined, Task
from fleetune.device_runtime.contracts.fields import REASON_CHARS_MAX
from fleetune.device_runtime.contracts.wire import default_task_id
from fleetune.device_runtime.errors import TransportError, WireError


def names(enrol):
    return tuple(given.device_id for given in enrol.tasks)


def test_a_round_opens_when_all_are_there_and_closes_when_all_have_answered():
    machine = federation()
    assert machine.hello(hello("a"), 0.0) == []
    assert machine.hello(hello("b"), 5.0) == asked(1, "a", "b")
    assert give(machine, "b", 1) == []
    actions = give(machine, "a", 1)
    assert actions == [Close(1, 1, ("a", "b")), *asked(2, "a", "b")]
    give(machine, "a", 2)
    assert give(machine, "b", 2) == [Close(2, 2, ("a", "b")), Finish("2 rounds are done", ("a", "b"))]
    assert machine.finished


def test_the_first_round_waits_for_all_then_for_enough():
    machine = federation(clients=3, min_clients=2)
    machine.hello(hello("a"), 0.0)
    assert machine.hello(hello("b"), 1.0) == []
    assert machine.tick(29.9) == []
    assert machine.tick(30.0) == asked(1, "a", "b")


def test_too_few_devices_never_open_a_round():
    machine = federation(clients=3, min_clients=2)
    machine.hello(hello("a"), 0.0)
    assert machine.tick(1e6) == []


def test_later_rounds_do_not_wait_for_all():
    machine, _ = opened("a", "b", "c", min_clients=2)
    give(machine, "a", 1)
    give(machine, "b", 1)
    machine.offline("c", 2.0)
    assert machine.tick(101.0) == [Close(1, 1, ("a", "b"), lost=("c",)), *asked(2, "a", "b")]


def test_selection_is_seeded_and_of_the_size_asked_for():
    machine = Federation(job(clients=3, rounds=5, min_clients=3), Patience(), now=0.0)
    chosen = []
    for i in range(9):
        actions = machine.hello(hello(f"d{i}"), 0.0)
        chosen += of(Enrol, actions)
    for number in range(1, 5):
        for given in chosen[-1].tasks:
            actions = give(machine, given.device_id, number)
        chosen += of(Enrol, actions)
    assert [len(a.tasks) for a in chosen] == [3] * 5
    assert len({names(a) for a in chosen}) > 2


def test_selection_draws_as_the_golden_file_says():
    file = DATA / "draws.json"
    three, five, one = [case for case in json.loads(file.read_text()) if case["name"] == "selection"]
    assert second_round(three["given"])[1] == tuple(three["drawn"])
    machine, chosen = second_round(five["given"])
    assert chosen == tuple(five["drawn"])
    for device in chosen[1:]:
        give(machine, device, 2)
    actions = machine.declined(decline(chosen[0], 2), 2.0)
    assert names(of(Enrol, actions)[0]) == tuple(one["drawn"])


def second_round(given):
    """All of the golden case's devices are here when the first round closes; those asked next."""
    size = given["limit"]
    machine = federation(seed=given["seed"], clients=size, min_clients=size)
    for device in given["present"]:
        machine.hello(hello(device), 0.0)
    for device in given["paused"]:
        machine.paused(device, "hot")
    for device in given["present"][:size]:
        actions = give(machine, device, 1)
    return machine, names(of(Enrol, actions)[0])


def test_the_deadline_closes_a_round_that_has_enough(caplog):
    machine, _ = opened("a", "b", min_clients=1)
    give(machine, "a", 1)
    assert machine.tick(100.9) == []
    with caplog.at_level(logging.WARNING):
        assert machine.tick(101.0)[0] == Close(1, 1, ("a",), lost=("b",))
    assert "without b" in caplog.text
    assert machine.judge(update("b", 1)).reason == "round 1 is closed"


def test_the_deadline_extends_a_round_that_has_too_few_and_asks_others(caplog):
    machine = federation(clients=2, min_clients=2)
    machine.hello(hello("a"), 1.0)
    machine.hello(hello("b"), 1.0)
    machine.hello(hello("c"), 1.0)
    give(machine, "a", 1)
    machine.offline("b", 2.0)
    with caplog.at_level(logging.WARNING):
        actions = machine.tick(101.0)
    assert "1 of at least 2 updates at its deadline: extended" in caplog.text
    assert actions == [Assign(task("b", 1, 1), 100.0), *asked(1, "c", first=2)]
    give(machine, "c", 1)
    assert machine.tick(201.0)[0] == Close(1, 1, ("a", "c"), lost=("b",))


def test_a_round_that_never_gets_enough_ends_with_an_error_that_says_so():
    machine, _ = opened("a", "b", patience=Patience(deadline_s=10, extensions_max=2))
    give(machine, "a", 1)
    machine.tick(11.0)
    machine.tick(21.0)
    with pytest.raises(TransportError, match=r"round 1: 1 of at least 2 updates .* after 2 extensions"):
        machine.tick(31.0)


def test_without_a_deadline_a_round_waits_for_ever():
    machine, actions = opened("a", "b", patience=Patience(deadline_s=0))
    assert of(Assign, actions)[0].deadline_s == 0.0
    assert machine.tick(1e9) == []


def test_a_device_that_died_gets_its_offer_again_with_the_time_left():
    machine, _ = opened("a", "b")
    machine.offline("b", 2.0)
    assert machine.hello(hello("b"), 41.0) == [Assign(task("b", 1, 1), 60.0)]
    give(machine, "b", 1)
    assert machine.hello(hello("b"), 42.0) == []


def test_a_late_or_strange_update_gets_its_reason():
    machine, _ = opened("a", "b")
    reasons = {
        "round 2 is unknown; the newest is 1": update("a", 2),
        "round 0 is unknown; the newest is 1": update("a", 0),
        "device 'x' was not asked in round 1": update("x", 1),
        "it starts from version 7; round 1 starts from 0": update("a", 1, version=7),
        "its codec is 'int8'; 'fp32' was asked for": update("a", 1, codec="int8"),
        "it answers task 'other'; this device's is 'train-1-a'": update("a", 1, task_id="other"),
    }
    for reason, sent in reasons.items():
        verdict = machine.judge(sent)
        assert (verdict.accepted, verdict.reason, verdict.digest) == (False, reason, sent.payload.sha256)


def test_a_duplicate_is_accepted_again_and_another_digest_is_refused():
    machine, _ = opened("a", "b")
    give(machine, "a", 1)
    assert machine.judge(update("a", 1)).accepted
    other = machine.judge(update("a", 1, digest="other"))
    assert (other.accepted, other.reason) == (False, "another update of this device is accepted in round 1")
    give(machine, "b", 1)
    assert machine.judge(update("a", 1)).accepted, "also after the round is closed"


def test_a_refused_update_does_not_stop_the_round():
    machine, _ = opened("a", "b", min_clients=1)
    give(machine, "a", 1)
    assert machine.refused(update("b", 1), "NaN", 2.0)[0] == Close(1, 1, ("a",))


def test_a_refused_update_keeps_its_reason_and_a_better_one_is_welcome():
    machine, _ = opened("a", "b")
    assert machine.refused(update("b", 1), "NaN in w", 2.0) == []
    assert machine.judge(update("b", 1)).reason == "NaN in w"
    assert isinstance(machine.judge(update("b", 1, digest="better")), Task)
    machine.accepted(update("b", 1, digest="better"), 3.0)
    assert give(machine, "a", 1)[0] == Close(1, 1, ("a", "b"))


def test_a_device_that_declines_is_not_waited_for():
    machine, _ = opened("a", "b", min_clients=1)
    give(machine, "a", 1)
    assert machine.declined(decline("x", 1), 2.0) == []
    assert (
        machine.declined(decline("b", 7), 2.0)
        == machine.declined(decline("b", 1, task_id="other"), 2.0)
        == []
    )
    assert machine.declined(decline("b", 1, task_id="train-1-b"), 2.0)[0] == Close(1, 1, ("a",))


def test_a_paused_device_is_asked_after_the_others():
    machine, _ = opened("a", "b", rounds=30)
    machine.hello(hello("c"), 1.0)
    machine.paused("a", "hot")
    chosen = ("a", "b")
    for number in range(1, 21):
        actions = [action for name in chosen for action in give(machine, name, number)]
        chosen = names(of(Enrol, actions)[0])
        assert chosen == ("b", "c")
    machine.paused("a", "")
    machine.paused("c", "hot")
    assert names(of(Enrol, [x for name in chosen for x in give(machine, name, 21)])[0]) == ("a", "b")


def test_paused_devices_are_asked_where_there_are_no_others():
    machine = federation()
    machine.paused("a", "hot")
    machine.hello(hello("a"), 0.0)
    assert machine.hello(hello("b"), 0.0) == asked(1, "a", "b")


def test_when_all_are_refused_a_newcomer_is_asked_at_once():
    machine, _ = opened("a")
    machine.refused(update("a", 1), "NaN", 2.0)
    assert machine.hello(hello("b"), 3.0) == asked(1, "b", first=1, deadline_s=98.0, clients=1, min_clients=1)
    assert give(machine, "b", 1)[0] == Close(1, 1, ("b",))


@pytest.mark.parametrize(
    ("strange", "said"),
    [
        (hello("a", artifact="b" * 64), "its artifact is bbbbbbbbbbbb, this job's is aaaaaaaaaaaa"),
        (hello("a", num_samples=0), "it has no samples"),
    ],
)
def test_an_unwanted_device_is_dismissed(strange, said):
    assert federation().hello(strange, 0.0) == [Dismiss("a", said)]


def test_an_unknown_role_is_a_wire_error():
    with pytest.raises(WireError, match="role 'spectate'; expected train or evaluate"):
        federation().hello(hello("a", role="spectate"), 0.0)


def test_a_restart_goes_on_in_the_open_round():
    machine = federation(
        past(2, "a", "b", accepted=[(1, "a"), (1, "b"), (2, "a")], reported=frozenset({(0, "e")})), rounds=2
    )
    assert machine.round == 2
    assert machine.judge(update("a", 2)).accepted
    assert machine.judge(update("b", 1)).accepted
    assert machine.hello(hello("a"), 1.0) == []
    assert machine.hello(hello("b"), 40.0) == [Assign(task("b", 2, 1), 60.0)]
    assert give(machine, "b", 2) == [Close(2, 2, ("a", "b"))], "the evaluating device of before is awaited"
    assert machine.hello(hello("e", role="evaluate"), 50.0) == [evaluation("e", 1)]


def test_a_restart_between_the_last_update_and_the_closing_closes():
    machine = federation(past(1, "a", accepted=[(1, "a")]), clients=1, min_clients=1)
    assert machine.tick(0.0)[0] == Close(1, 1, ("a",))


def test_versions_and_rounds_are_counted_apart():
    machine = federation(
        past(2, "a", version=7, closed=1, tasks=(task("a", 2, version=7),)), clients=1, min_clients=1
    )
    assert machine.judge(update("a", 2)).reason == "it starts from version 1; round 2 starts from 7"
    sent = update("a", 2, version=7)
    assert machine.judge(sent) == task("a", 2, version=7)
    assert machine.accepted(sent, 1.0)[0] == Close(2, 8, ("a",))
    assert (machine.version, machine.round) == (8, 2)


def test_a_round_says_when_it_is_due():
    machine = federation(clients=3, min_clients=2)
    assert machine.due_at() == inf
    machine.hello(hello("a"), 1.0)
    assert machine.due_at() == inf, "one is too few, however late"
    machine.hello(hello("b"), 2.0)
    assert machine.due_at() == 30.0
    assert machine.tick(29.9) == []
    machine.tick(30.0)
    assert machine.due_at() == 130.0
    assert machine.tick(129.9) == machine.tick(129.9) == []


def test_the_end_says_when_it_is_due():
    machine = Federation(job(rounds=1, clients=1, min_clients=1), Patience(evaluation_s=10), now=0.0)
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.hello(hello("a"), 0.0)
    give(machine, "a", 1, now=5.0)
    assert machine.due_at() == 15.0
    machine.tick(15.0)
    assert machine.due_at() == inf


def test_a_finished_job_dismisses_who_comes():
    machine = federation(Past(version=2, closed=2, finished=True))
    assert machine.tick(0.0) == []
    assert machine.hello(hello("a"), 0.0) == [Dismiss("a", "the job is finished", is_error=False)]


def test_a_long_reason_is_cut():
    assert len(verdict_on(update("a", 1), "x" * 10_000).reason) == REASON_CHARS_MAX
    assert verdict_on(update("a", 1)).accepted


def test_a_job_with_fewer_rounds_than_are_done_ends_at_once_whatever_round_is_open():
    """Its update would make a version that nobody asked for."""
    machine = federation(past(3, "a", "b", accepted=[(1, "a"), (2, "a"), (3, "a")]), rounds=2)
    assert machine.round == 2
    assert machine.judge(update("b", 3)).reason == "round 3 is unknown; the newest is 2"
    (end,) = machine.tick(0.0)
    assert end == Finish("2 rounds are done", ())


def test_rounds_that_are_added_go_on_with_the_round_that_was_open():
    machine = federation(past(3, "a", "b", accepted=[(1, "a"), (2, "a"), (3, "a")]), rounds=4)
    assert machine.hello(hello("b"), 1.0) == [Assign(task("b", 3, 1), 99.0)]
    assert give(machine, "b", 3)[0] == Close(3, 3, ("a", "b"))


def test_the_reports_of_a_model_that_went_astray_are_refused():
    machine, _ = opened("a")
    machine.hello(hello("e", role="evaluate"), 1.0)
    for figures in ({"loss": 1e300}, {"loss": float("inf")}, {"accuracy": float("nan")}, {"num_samples": 0}):
        assert machine.evaluations.judge(report("e", 0, **figures), 0).endswith("not a measurement"), figures
    assert machine.evaluations.judge(report("e", 0, loss=3.4e38), 0) == ""


def test_what_was_declined_before_a_restart_is_not_offered_again():
    before = past(1, "a", "b", accepted=())._replace(
        declined={default_task_id("train", 1, "a"): Declined("", "no")}
    )
    machine = federation(before)
    assert of(Assign, machine.hello(hello("a"), 1.0)) == []
    assert [offer.task.device_id for offer in of(Assign, machine.hello(hello("b"), 1.0))] == ["b"]
    assert machine.rounds.open_round.standing("a") is Standing.REFUSED


def test_a_device_of_0_1_0_says_in_words_that_memory_lacks():
    said = decline("a", 1)
    assert (
        cause_of(msgspec.structs.replace(said, reason="memory budget of 9 MB: the least is 10 MB"))
        == "memory"
    )
    assert cause_of(msgspec.structs.replace(said, cause="work")) == "work"
    assert cause_of(msgspec.structs.replace(said, cause="anything")) == ""
    assert cause_of(said) == ""


def test_who_keeps_updates_is_asked_for_them_and_none_is_remembered():
    kept = {}
    machine = Federation(job(clients=1, rounds=9, min_clients=1), Patience(), now=0.0, digest_of=kept.get)
    machine.hello(hello("a"), 0.0)
    sent = update("a", 1)
    kept[sent.task_id] = sent.payload.sha256
    machine.accepted(sent, 1.0)
    assert machine.judge(sent).accepted, "the round is closed"
    assert not machine.judge(update("a", 1, digest="other")).accepted
    assert machine._accepted == {}


def test_the_ledger_is_not_asked_for_what_the_open_round_knows():
    said = []
    machine = Federation(
        job(), Patience(deadline_s=100), now=0.0, digest_of=lambda task_id: said.append(task_id) or "d-a"
    )
    for device in ("a", "b"):
        machine.hello(hello(device), 0.0)
    assert machine.judge(update("a", 1)) == task("a", 1)
    assert said == [], "it owes this"
    machine.accepted(update("a", 1), 1.0)
    assert machine.judge(update("a", 1)).accepted
    assert not machine.judge(update("a", 1, digest="other")).accepted
    assert said == [task("a", 1).task_id] * 2
