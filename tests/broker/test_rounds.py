import logging

import pytest

from broker.rounds import Ask, Close, Dismiss, Federation, Finish, Past, Send
from broker.settings import Patience, Settings, check_settings, device_work, differences
from device_runtime.errors import ConfigError, TransportError, UnknownName, WireError
from device_runtime.wire import Hello, LocalWork, Report, TransferManifest, UpdateReady

ARTIFACT = "a" * 64


def job(**changes):
    fields = {"job": "j", "artifact": ARTIFACT, "rounds": 2, "clients": 2, "min_clients": 2, **changes}
    return Settings(**fields)


def federation(past=None, *, patience=None, **changes):
    return Federation(job(**changes), patience or Patience(deadline_s=100, gather_s=30), now=0.0, past=past)


def hello(device, *, role="train", artifact=ARTIFACT, num_samples=10):
    return Hello(device_id=device, artifact=artifact, role=role, num_samples=num_samples)


def update(device, round_number, *, digest="d", version=None, codec="fp32"):
    payload = TransferManifest(size_bytes=1, chunk_bytes=1, chunk_digests=b"", sha256=f"{digest}-{device}")
    version = round_number - 1 if version is None else version
    return UpdateReady(
        device_id=device,
        job="j",
        round=round_number,
        version=version,
        codec=codec,
        num_samples=10,
        payload=payload,
    )


def report(device, version, *, accuracy=0.5, loss=1.0, num_samples=4):
    return Report(
        device_id=device,
        job="j",
        round=version,
        version=version,
        loss=loss,
        accuracy=accuracy,
        num_samples=num_samples,
    )


def give(machine, device, round_number, now=1.0):
    sent = update(device, round_number)
    assert machine.judge(sent) is None
    return machine.accepted(sent, now)


def of(kind, actions):
    return [a for a in actions if isinstance(a, kind)]


def opened(*devices, patience=None, **changes):
    machine = federation(
        patience=patience, **{"clients": len(devices), "min_clients": len(devices), **changes}
    )
    for device in devices:
        actions = machine.hello(hello(device), 1.0)
    return machine, actions


def test_a_round_opens_when_all_are_there_and_closes_when_all_have_answered():
    machine = federation()
    assert machine.hello(hello("a"), 0.0) == []
    actions = machine.hello(hello("b"), 5.0)
    assert actions == [
        Ask(1, ("a", "b")),
        Send("a", "train", 1, 0, 0, 100.0),
        Send("b", "train", 1, 0, 1, 100.0),
    ]
    assert give(machine, "b", 1) == []
    actions = give(machine, "a", 1)
    assert actions[:2] == [Close(1, ("a", "b")), Ask(2, ("a", "b"))]
    give(machine, "a", 2)
    assert give(machine, "b", 2) == [Close(2, ("a", "b")), Finish("2 rounds are done")]
    assert machine.finished


def test_the_first_round_waits_for_all_then_for_enough():
    machine = federation(clients=3, min_clients=2)
    machine.hello(hello("a"), 0.0)
    assert machine.hello(hello("b"), 1.0) == []
    assert machine.tick(29.9) == []
    assert machine.tick(30.0)[0] == Ask(1, ("a", "b"))


def test_too_few_devices_never_open_a_round():
    machine = federation(clients=3, min_clients=2)
    machine.hello(hello("a"), 0.0)
    assert machine.tick(1e6) == []


def test_later_rounds_do_not_wait_for_all():
    machine, _ = opened("a", "b", "c", min_clients=2)
    give(machine, "a", 1)
    give(machine, "b", 1)
    machine.offline("c", 2.0)
    assert machine.tick(101.0)[:2] == [Close(1, ("a", "b")), Ask(2, ("a", "b"))]


def test_selection_is_seeded_and_of_the_size_asked_for():
    machine = Federation(job(clients=3, rounds=5, min_clients=3), Patience(), now=0.0)
    chosen = []
    for i in range(9):
        actions = machine.hello(hello(f"d{i}"), 0.0)
        chosen += of(Ask, actions)
    for number in range(1, 5):
        for device in chosen[-1].devices:
            actions = give(machine, device, number)
        chosen += of(Ask, actions)
    assert [len(a.devices) for a in chosen] == [3] * 5
    assert len({a.devices for a in chosen}) > 2


def test_the_deadline_closes_a_round_that_has_enough(caplog):
    machine, _ = opened("a", "b", min_clients=1)
    give(machine, "a", 1)
    assert machine.tick(100.9) == []
    with caplog.at_level(logging.WARNING):
        assert machine.tick(101.0)[0] == Close(1, ("a",))
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
    assert actions == [Send("b", "train", 1, 0, 1, 100.0), Ask(1, ("c",)), Send("c", "train", 1, 0, 2, 100.0)]
    give(machine, "c", 1)
    assert machine.tick(201.0)[0] == Close(1, ("a", "c"))


def test_a_round_that_never_gets_enough_ends_with_an_error_that_says_so():
    machine, _ = opened("a", "b", patience=Patience(deadline_s=10, extensions_max=2))
    give(machine, "a", 1)
    machine.tick(11.0)
    machine.tick(21.0)
    with pytest.raises(TransportError, match=r"round 1: 1 of at least 2 updates .* after 2 extensions"):
        machine.tick(31.0)


def test_without_a_deadline_a_round_waits_for_ever():
    machine, actions = opened("a", "b", patience=Patience(deadline_s=0))
    assert of(Send, actions)[0].deadline_s == 0.0
    assert machine.tick(1e9) == []


def test_a_device_that_died_gets_its_offer_again_with_the_time_left():
    machine, _ = opened("a", "b")
    machine.offline("b", 2.0)
    assert machine.hello(hello("b"), 41.0) == [Send("b", "train", 1, 0, 1, 60.0)]
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
    assert machine.refused(update("b", 1), "NaN", 2.0)[0] == Close(1, ("a",))


def test_a_refused_update_keeps_its_reason_and_a_better_one_is_welcome():
    machine, _ = opened("a", "b")
    assert machine.refused(update("b", 1), "NaN in w", 2.0) == []
    assert machine.judge(update("b", 1)).reason == "NaN in w"
    assert machine.judge(update("b", 1, digest="better")) is None
    machine.accepted(update("b", 1, digest="better"), 3.0)
    assert give(machine, "a", 1)[0] == Close(1, ("a", "b"))


def test_a_device_that_declines_is_not_waited_for():
    machine, _ = opened("a", "b", min_clients=1)
    give(machine, "a", 1)
    assert machine.declined("x", 1, 2.0) == []
    assert machine.declined("b", 7, 2.0) == []
    assert machine.declined("b", 1, 2.0)[0] == Close(1, ("a",))


def test_a_paused_device_is_asked_after_the_others():
    machine, _ = opened("a", "b", rounds=30)
    machine.hello(hello("c"), 1.0)
    machine.paused("a", is_paused=True)
    asked = ("a", "b")
    for number in range(1, 21):
        actions = [action for name in asked for action in give(machine, name, number)]
        asked = of(Ask, actions)[0].devices
        assert asked == ("b", "c")
    machine.paused("a", is_paused=False)
    machine.paused("c", is_paused=True)
    assert of(Ask, [x for name in asked for x in give(machine, name, 21)])[0].devices == ("a", "b")


def test_paused_devices_are_asked_where_there_are_no_others():
    machine = federation()
    machine.paused("a", is_paused=True)
    machine.hello(hello("a"), 0.0)
    assert machine.hello(hello("b"), 0.0)[0] == Ask(1, ("a", "b"))


def test_an_evaluating_device_that_declines_is_not_waited_for():
    machine = federation(rounds=1, clients=1, min_clients=1)
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.hello(hello("a"), 0.0)
    give(machine, "a", 1)
    assert machine.declined("e", 0, 2.0) == [Send("e", "evaluate", 1, 1, 0, 0.0)]
    assert machine.declined("e", 1, 2.0) == [Finish("1 rounds are done")]


def test_when_all_are_refused_a_newcomer_is_asked_at_once():
    machine, _ = opened("a")
    machine.refused(update("a", 1), "NaN", 2.0)
    assert machine.hello(hello("b"), 3.0)[0] == Ask(1, ("b",))
    assert give(machine, "b", 1)[0] == Close(1, ("b",))


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


def test_evaluation_follows_in_order_and_rounds_do_not_wait_for_it():
    machine = federation(rounds=2)
    assert machine.hello(hello("e", role="evaluate"), 0.0) == [Send("e", "evaluate", 0, 0, 0, 0.0)]
    machine.hello(hello("a"), 0.0)
    machine.hello(hello("b"), 0.0)
    give(machine, "a", 1)
    give(machine, "b", 1)
    give(machine, "a", 2)
    assert give(machine, "b", 2) == [Close(2, ("a", "b"))], "the last evaluation is waited for"
    assert machine.reported(report("e", 0), 2.0) == [Send("e", "evaluate", 1, 1, 0, 0.0)]
    assert machine.reported(report("e", 1), 3.0) == [Send("e", "evaluate", 2, 2, 0, 0.0)]
    assert machine.reported(report("e", 2), 4.0) == [Finish("2 rounds are done")]


def test_an_evaluating_device_that_comes_back_goes_on_where_it_was():
    machine = federation()
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.offline("e", 1.0)
    assert machine.hello(hello("e", role="evaluate"), 2.0) == [Send("e", "evaluate", 0, 0, 0, 0.0)]
    assert machine.hello(hello("e", role="evaluate"), 3.0) == [Send("e", "evaluate", 0, 0, 0, 0.0)]


def test_the_last_evaluation_is_waited_for_as_long_as_reports_come(caplog):
    machine = Federation(job(rounds=1, clients=1, min_clients=1), Patience(evaluation_s=10), now=0.0)
    machine.hello(hello("e", role="evaluate"), 0.0)
    machine.hello(hello("a"), 0.0)
    give(machine, "a", 1, now=5.0)
    assert machine.tick(14.9) == []
    machine.reported(report("e", 0), 14.9)
    assert machine.tick(24.8) == []
    with caplog.at_level(logging.WARNING):
        assert machine.tick(24.9) == [Finish("1 rounds are done")]
    assert "without the last evaluation of e" in caplog.text


def test_only_every_so_many_versions_and_the_last_are_evaluated():
    machine = Federation(job(rounds=3, clients=1, min_clients=1, evaluate_every=2), Patience(), now=0.0)
    versions = [a.version for a in machine.hello(hello("e", role="evaluate"), 0.0)]
    machine.hello(hello("a"), 0.0)
    for number in (1, 2, 3):
        give(machine, "a", number)
    while not machine.finished:
        versions += [a.version for a in of(Send, machine.reported(report("e", versions[-1]), 1.0))]
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
    assert said in machine.judge_report(strange)
    assert machine.judge_report(report("e", 0)) == ""


def test_a_restart_goes_on_in_the_open_round():
    past = Past(
        version=1,
        asked=("a", "b"),
        accepted={(1, "a"): "d-a", (1, "b"): "d-b", (2, "a"): "d-a"},
        reported=frozenset({(0, "e")}),
    )
    machine = federation(past, rounds=2)
    assert machine.round == 2
    assert machine.judge(update("a", 2)).accepted
    assert machine.judge(update("b", 1)).accepted
    assert machine.hello(hello("a"), 1.0) == []
    assert machine.hello(hello("b"), 40.0) == [Send("b", "train", 2, 1, 1, 60.0)]
    assert give(machine, "b", 2) == [Close(2, ("a", "b"))], "the evaluating device of before is awaited"
    assert machine.hello(hello("e", role="evaluate"), 50.0) == [Send("e", "evaluate", 1, 1, 0, 0.0)]


def test_a_restart_between_the_last_update_and_the_closing_closes():
    past = Past(version=0, asked=("a",), accepted={(1, "a"): "d-a"})
    assert federation(past, clients=1, min_clients=1).tick(0.0)[0] == Close(1, ("a",))


def test_a_finished_job_dismisses_who_comes():
    machine = federation(Past(version=2, finished=True))
    assert machine.tick(0.0) == []
    assert machine.hello(hello("a"), 0.0) == [Dismiss("a", "the job is finished", is_error=False)]


def test_settings_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        check_settings(
            job(rounds=0, clients=2, min_clients=3, work=LocalWork(batch_size=0)), Patience(deadline_s=-1)
        )
    for said in ("rounds 0", "min_clients 3: from 1 to clients (2)", "batch_size 0", "deadline_s -1"):
        assert said in str(caught.value)
    with pytest.raises(UnknownName, match="no strategy 'x'"):
        check_settings(job(strategy="x"), Patience())
    with pytest.raises(ConfigError, match="job 'a/b'"):
        check_settings(job(job="a/b"), Patience())


def test_every_device_of_every_round_has_a_seed_of_its_own():
    seeds = [device_work(job(seed=5), round_number=r, position=p).seed for r in (1, 2, 3) for p in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 150


def test_every_device_of_a_round_knows_how_many_came_before():
    works = [device_work(job(), round_number=r, position=p) for r in (1, 2, 3) for p in range(2)]
    assert [work.rounds_before for work in works] == [0, 0, 1, 1, 2, 2]


def test_differences_name_the_fields():
    assert differences(job(), job(clients=3)) == ["clients: 2, was 3"]
