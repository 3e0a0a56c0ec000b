import logging
from math import inf

import golden_wire
import msgspec
import numpy as np
import pytest
from fleet import ARTIFACT, JOB, first_adapter
from hypothesis import given, settings
from hypothesis import strategies as st
from stranger import Stranger, good_payload

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.methods.configurators import CONFIGURATORS, Choice, Configurator
from fleetune.broker.service import service
from fleetune.broker.service.rivals import is_knock, knock_of
from fleetune.broker.store.rows import rows
from fleetune.broker.tasks import Noted, Outcome
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.fields import FIGURE_MAX
from fleetune.device_runtime.contracts.pull import PATIENCE, SLOWEST_BYTES_S
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    DeviceStatus,
    Finished,
    Hello,
    Offer,
    Report,
    Request,
    Verdict,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import StateError


def test_an_offer_leaves_after_the_ledger_has_its_task(tmp_path):
    stranger = Stranger(tmp_path)
    kept = []

    def watched(topic, payload):
        if isinstance(offer := decode(payload), Offer):
            kept.append([(t.task_id, t.work) for t in stranger.aggregator.ledger.past().tasks])
            assert kept[-1] == [(offer.task_id, offer.work)]
        return (payload,)

    stranger.server.disturb = watched
    stranger.hello()
    assert len(kept) == 1


class Choosy:
    """A configurator whose choice, and codec, changes with every one of its lives."""

    def __init__(self):
        self.lives, self.learned = 0, []

    def make(self):
        self.lives += 1
        codec, steps = ("int8", "fp32")[self.lives % 2], 10 * self.lives

        def choose(state, candidate):
            return Choice(LocalWork(steps=steps + candidate.position, codec=codec, seed=candidate.round))

        def learn(state, outcome):
            self.learned.append((self.lives, outcome))
            return state

        return Configurator(lambda settings: None, choose, learn)


@pytest.fixture
def choosy(monkeypatch):
    choosy = Choosy()
    monkeypatch.setitem(CONFIGURATORS, "choosy", choosy.make)
    return choosy


def test_a_restart_offers_the_very_work_that_was_offered_before(tmp_path, choosy):
    stranger = Stranger(tmp_path, configurator="choosy", rounds=2)
    stranger.hello()
    (offer,) = stranger.heard(Offer)
    assert (offer.work.steps, offer.work.codec) == (10, "fp32")
    stranger.aggregator.kill()
    stranger.aggregator.start(2.0)
    stranger.hello()
    (again,) = stranger.heard(Offer)
    assert (again.task_id, again.work) == (offer.task_id, offer.work)
    assert (
        "its codec is 'int8'; 'fp32' was asked for"
        in stranger.deliver(good_payload(), codec="int8")[0].reason
    )
    stranger.say(stranger.ready(good_payload(), task_id=offer.task_id, stats={"loss": 0.5}))
    (verdict,) = stranger.deliver(good_payload(), task_id=offer.task_id, stats={"loss": 0.5})
    assert (verdict.accepted, verdict.task_id) == (True, offer.task_id)
    stranger.hello()
    (later,) = stranger.heard(Offer)
    assert (later.task_id, later.work.steps, later.work.codec) == ("train-2-device-0", 20, "int8")
    assert choosy.learned == [(2, _outcome(offer.work))]


def _outcome(work):
    """Of a good update with this loss: the payload was there at once."""
    noted = Noted(bytes_up=len(good_payload()))
    return Outcome("device-0", work, {"loss": 0.5}, round=1, num_samples=5, noted=noted)


def test_a_restart_learns_again_what_was_learned(tmp_path, choosy):
    stranger = Stranger(tmp_path, configurator="choosy", rounds=2)
    stranger.hello()
    (offer,) = stranger.heard(Offer)
    stranger.deliver(good_payload(), stats={"loss": 0.5})
    stranger.aggregator.kill()
    stranger.aggregator.start(2.0)
    outcome = _outcome(offer.work)
    assert choosy.learned == [(1, outcome), (2, outcome)]


def test_an_update_is_held_to_the_codec_that_was_offered_to_its_device(tmp_path, choosy):
    choosy.lives = 1
    stranger = Stranger(tmp_path, configurator="choosy")
    stranger.hello()
    assert stranger.heard(Offer)[0].work.codec == "int8"
    assert "'int8' was asked for" in stranger.deliver(good_payload())[0].reason
    adapter = first_adapter()
    packed = encode_update("int8", {n: v + np.float32(1) for n, v in adapter.items()}, adapter)
    assert [v.accepted for v in stranger.deliver(packed, codec="int8")] == [True]


def test_the_service_says_when_it_is_due(tmp_path):
    stranger = Stranger(tmp_path, patience=Patience(deadline_s=100))
    service = stranger.aggregator.service
    assert service.due_at(1.0) == 1.0, "its status is not announced yet"
    service.tick(1.0)
    assert service.due_at(1.0) == inf
    stranger.hello()
    assert service.due_at(1.0) == 101.0
    stranger.say(stranger.ready(good_payload()))
    assert service.due_at(1.0) == 1.0 + PATIENCE * len(good_payload()) / SLOWEST_BYTES_S, (
        "chunks asked for may be lost"
    )
    stranger.heard(Request)
    lost_at = service.due_at(1.0)
    service.tick(lost_at - 0.1)
    assert stranger.heard(Request) == []
    service.tick(lost_at)
    assert stranger.heard(Request)
    stranger.server.restart()
    assert service.due_at(lost_at + 1) == lost_at + 1


def test_a_tick_more_changes_nothing(tmp_path):
    stranger = Stranger(tmp_path, rounds=2)
    stranger.hello()
    stranger.deliver(good_payload())
    stranger.heard(Offer)
    before = stranger.aggregator.service.snapshot(), stranger.aggregator.ledger.past()
    for _ in range(3):
        stranger.aggregator.service.tick(stranger.now)
    assert (stranger.aggregator.service.snapshot(), stranger.aggregator.ledger.past()) == before
    assert stranger.heard(object) == []


def test_a_foreign_device_is_sent_home_with_the_reason(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello(artifact="f" * 64)
    (finished,) = stranger.heard(Finished)
    assert finished.is_error
    assert finished.reason == "its artifact is ffffffffffff, this job's is aaaaaaaaaaaa"


@pytest.mark.parametrize(
    "message",
    [
        Hello(device_id="someone-else", artifact=ARTIFACT),
        Hello(device_id="device-0", artifact=ARTIFACT, role="spectate", num_samples=1),
        Verdict(job=JOB, round=1, accepted=True),
        Finished(job=JOB),
        Finished(job="another"),
        AggregatorStatus(job=JOB, session="x", online=True, round=1, version=1),
        Request(sha256="0" * 64, missing=b"\xff"),
        Request(sha256="", missing=b"", limit=-5),
        Chunk(sha256="0" * 64, index=0, data=b"x"),
    ],
)
def test_a_message_out_of_place_changes_nothing(tmp_path, message, caplog):
    stranger = Stranger(tmp_path)
    with caplog.at_level(logging.WARNING):
        stranger.say(message)
    assert isinstance(message, Chunk) or "dropped a message on" in caplog.text
    stranger.hello()
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]


@pytest.mark.parametrize("bitmap", [b"", b"\xff" * 1000])
def test_a_request_with_a_strange_bitmap_is_dropped(tmp_path, bitmap):
    stranger = Stranger(tmp_path)
    stranger.hello()
    (offer,) = stranger.heard(Offer)
    stranger.say(Request(sha256=offer.adapter.sha256, missing=bitmap, limit=2**31))
    assert stranger.heard(Chunk) == []


@pytest.mark.parametrize("topic", ["fleetune/v1/job/device/../up", "x", "", "fleetune/v1/job/device/%00/up"])
def test_a_strange_topic_is_dropped(tmp_path, topic):
    stranger = Stranger(tmp_path)
    stranger.aggregator.service.take(topic, encode(Hello(device_id="..", artifact=ARTIFACT)), 1.0)


def test_no_garbage_stops_the_service(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello()
    seeds = [
        encode(stranger.ready(good_payload())),
        encode(Hello(device_id="device-0", artifact=ARTIFACT, num_samples=1)),
        encode(
            Report(device_id="device-0", job=JOB, round=0, version=0, loss=1.0, accuracy=0.5, num_samples=1)
        ),
        encode(Request(sha256="0" * 64, missing=b"\xff")),
        encode(Chunk(sha256="0" * 64, index=0, data=b"x")),
    ]

    @given(st.sampled_from(seeds), st.integers(0, 400), st.binary(min_size=1, max_size=4), st.booleans())
    @settings(max_examples=300, deadline=None)
    def throw(seed, at, junk, cut):
        at = at % len(seed)
        stranger.say_raw(seed[:at] + junk + (b"" if cut else seed[at + len(junk) :]))

    throw()
    stranger.say_raw(b"\xff" * 200_000)
    assert stranger.deliver(good_payload())[-1].accepted


def test_the_status_is_retained_and_small(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello()
    stranger.deliver(good_payload())
    late = stranger.server.connect([aggregator_topic(JOB)])
    _, payload = late.receive(0)
    status = decode(payload)
    assert (status.finished, status.version, status.session) == (True, 1, "session-1")
    assert len(payload) < 200
    stranger.aggregator.kill()
    assert not decode(late.receive(0)[1]).online, "the will says so"


def status_of(name, *, online):
    return device_topic(JOB, name, "status"), encode(DeviceStatus(device_id=name, online=online))


def test_when_the_job_is_over_the_statuses_of_those_who_are_gone_are_cleared(tmp_path):
    stranger = Stranger(tmp_path)
    for name, online in (("gone", False), ("back", False), ("back", True), ("here", True)):
        stranger.link.publish(*status_of(name, online=online), retain=True)
    stranger.hello()
    every = [device_topic(JOB, "+", "status")]
    stranger.aggregator.service.stop(1.0)
    assert len(stranger.server.connect(every).inbox) == 3, "it is not over"
    stranger.deliver(good_payload())
    stranger.aggregator.service.stop(1.0)
    found = [topic for topic, _ in stranger.server.connect(every).inbox]
    assert sorted(found) == [status_of(name, online=True)[0] for name in ("back", "here")]
    stranger.aggregator.poll(2.0)


def test_messages_that_were_dropped_are_told_in_one_line(tmp_path, caplog):
    stranger = Stranger(tmp_path)
    stranger.aggregator.link.dropped = 7
    for _ in range(3):
        stranger.hello()
    found = [r.getMessage() for r in caplog.records if "dropped" in r.getMessage()]
    assert len(found) == 1
    assert found[0].startswith("7 messages were dropped")


def test_an_empty_message_is_no_news(tmp_path, caplog):
    stranger = Stranger(tmp_path)
    stranger.aggregator.service.take(device_topic(JOB, "device-0", "status"), b"", 1.0)
    assert caplog.records == []


HUGE = (
    2**31,
    2**63 - 1,
    2**63,
    2**64 - 1,
    -1,
    -(2**63),
    1e300,
    float("nan"),
    float("inf"),
    10**6,
    None,
    True,
)


STRANGE = (
    "",
    "x" * 120_000,
    "\x1b[2J\n2026 WARNING round 9: closed with a, b, c",
    b"\xff" * 9,
    [],
    {},
    {"x": 1e308},
)


def test_no_number_and_no_text_of_any_message_stops_the_service(tmp_path, caplog):
    """Every field of every message, with everything that a login may put there."""
    stranger = Stranger(tmp_path)
    stranger.hello()
    stranger.say(Hello(device_id="judge", artifact=ARTIFACT, num_samples=5, role="evaluate"), name="judge")
    task = {"task_id": "evaluate-0-judge", "device_id": "judge"}
    for kind in golden_wire.MESSAGES:
        base = msgspec.msgpack.decode(encode(golden_wire.filled(kind)))
        base |= {"job": JOB, "round": 0, "version": 0, "loss": 1.0, "accuracy": 0.5, "num_samples": 1, **task}
        for name in base:
            for value in (*HUGE, *STRANGE):
                stranger.say_raw(msgspec.msgpack.encode({**base, name: value}), name="judge")
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert max(len(record.getMessage()) for record in caplog.records) < 900
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]
    for found in rows(stranger.aggregator.ledger):
        assert found.loss is None or found.loss <= FIGURE_MAX


@pytest.mark.parametrize("num_samples", [2**63 - 1, 2**64 - 1])
def test_a_report_of_too_many_samples_spoils_nothing(tmp_path, num_samples, caplog):
    """107 bytes ended 0.1.0's aggregator, or its ledger for good."""
    stranger = Stranger(tmp_path)
    for name in ("device-0", "other"):
        stranger.say(Hello(device_id=name, artifact=ARTIFACT, num_samples=5, role="evaluate"), name=name)
    report = Report(
        device_id="device-0", job=JOB, round=0, version=0, loss=1.0, accuracy=1.0, num_samples=num_samples
    )
    with caplog.at_level(logging.WARNING):
        stranger.say(report)
    assert (
        "dropped a message on fleetune/v1/job/device/device-0/up: malformed message: Expected `int`"
        in caplog.text
    )
    honest = msgspec.structs.replace(report, device_id="other", num_samples=3, loss=2.0)
    stranger.say(honest, name="other")
    assert rows(stranger.aggregator.ledger)[0].loss == 2.0


def test_a_measurement_that_went_astray_is_answered(tmp_path):
    """Without a verdict the device would tell it for ever, and be asked for nothing else."""
    stranger = Stranger(tmp_path)
    stranger.hello(role="evaluate")
    report = Report(device_id="device-0", job=JOB, round=0, version=0, loss=1.0, accuracy=1.0, num_samples=3)
    for changes in ({"loss": float("nan")}, {"loss": 1e300}, {"accuracy": 1.5}, {"num_samples": 0}):
        stranger.say(msgspec.structs.replace(report, **changes))
        (verdict,) = stranger.heard(Verdict)
        assert (verdict.accepted, verdict.reason.endswith("not a measurement")) == (False, True)


def test_a_fault_of_ours_costs_the_message_that_found_it_and_no_more(tmp_path, monkeypatch, caplog):
    stranger = Stranger(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(stranger.aggregator.service.federation, "hello", lambda *_: {}["x"])
        stranger.hello()
    assert "dropped a message on fleetune/v1/job/device/device-0/up: KeyError: 'x'" in caplog.text
    stranger.hello()
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]


@pytest.mark.parametrize("error", [StateError("the disk is full"), OSError(28, "No space left on device")])
def test_our_own_disk_stops_the_service(tmp_path, monkeypatch, error):
    stranger = Stranger(tmp_path)
    stranger.hello(role="evaluate")

    def fail(_):
        raise error

    monkeypatch.setattr(stranger.aggregator.ledger, "report", fail)
    report = Report(device_id="device-0", job=JOB, round=0, version=0, loss=1.0, accuracy=1.0, num_samples=3)
    with pytest.raises(type(error)):
        stranger.say(report)


def test_what_a_callback_raises_is_not_taken_for_a_message(tmp_path, monkeypatch):
    stranger = Stranger(tmp_path)
    stranger.hello()
    monkeypatch.setattr(stranger.aggregator.service._reporter, "_on_row", lambda _: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        stranger.deliver(good_payload())


def test_a_stranger_writes_no_line_into_the_log(tmp_path, caplog):
    stranger = Stranger(tmp_path)
    forged = "no\n2026-11-25 round 9: closed with a, b, c\x1b[31m" + "y" * 100_000
    with caplog.at_level(logging.INFO):
        stranger.say(Decline(device_id="device-0", job=JOB, round=1, reason=forged))
        stranger.say(DeviceStatus(device_id="device-0", online=True, paused=forged))
        stranger.hello(role="x\x1b[31m")
        stranger.hello(artifact="f\nx")
        stranger.say(stranger.ready(good_payload(), task_id="\x1b"))
        stranger.aggregator.service.take("fleetune/v1/job/device/a\nb/up", b"", 1.0)
    assert "device-0 declined: no?2026-11-25 round 9: closed with a, b, c?[31m" in caplog.text
    assert all(record.getMessage().isprintable() for record in caplog.records)
    assert max(len(record.getMessage()) for record in caplog.records) < 700


def test_no_more_devices_than_are_remembered(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(service, "DEVICES_MAX", 3)
    stranger = Stranger(tmp_path, clients=9)
    for number in range(5):
        name = f"device-{number}"
        stranger.say(Hello(device_id=name, artifact=ARTIFACT, num_samples=5), name=name)
    assert caplog.text.count("3 devices have been here; no further one is taken") == 2
    assert len(stranger.aggregator.service.snapshot().devices) == 3


def test_an_aggregator_that_knocks_is_answered(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.aggregator.poll(1.0)
    stranger.heard(AggregatorStatus)
    stranger.link.publish(aggregator_topic(JOB), encode(knock_of(JOB)))
    stranger.aggregator.poll(1.0)
    *_, knock, answer = stranger.heard(AggregatorStatus)
    assert (is_knock(knock), is_knock(answer), answer.session, answer.online) == (
        True,
        False,
        "session-1",
        True,
    )
    stranger.aggregator.poll(1.0)
    assert stranger.heard(AggregatorStatus) == [], "its own answer is no knock"


def test_who_is_waited_for_is_told_when_it_changes(tmp_path, caplog):
    notes = []
    with caplog.at_level(logging.INFO):
        stranger = Stranger(tmp_path, clients=2, min_clients=2, on_note=notes.append)
        for _ in range(3):
            stranger.aggregator.poll(1.0)
        stranger.hello()
        stranger.hello()
        stranger.say(Hello(device_id="hall", artifact=ARTIFACT, num_samples=5), name="hall")
    assert notes == [
        "round 1: 0 of 2 devices here; waiting for 2 more",
        "round 1: 1 of 2 devices here: device-0; waiting for 1 more",
    ]
    assert notes[1] in caplog.text


def test_a_judge_that_is_missing_at_the_end_is_named(tmp_path):
    notes = []
    stranger = Stranger(tmp_path, on_note=notes.append)
    judge = Hello(device_id="judge", artifact=ARTIFACT, num_samples=5, role="evaluate")
    stranger.say(judge, name="judge")
    stranger.hello()
    stranger.deliver(good_payload())
    assert notes[-1] == "1 rounds are done; waiting for the evaluation of judge"


def test_a_flood_of_bad_messages_is_a_few_lines_in_the_log(tmp_path, caplog):
    stranger = Stranger(tmp_path)
    decline = {"device_id": "device-0", "job": JOB, "round": 1, "reason": "no"}
    bad = Report(device_id="device-0", job=JOB, round=0, version=0, loss=1.0, accuracy=2.0, num_samples=1)
    with caplog.at_level(logging.WARNING):
        for number in range(200):
            stranger.say(Decline(**decline))
            stranger.say(bad)
            stranger.say_raw(b"garbage")
            stranger.hello(artifact=f"other-{number}")
            stranger.say_raw(b"garbage", name=f"device-{number % 3 + 1}")
    assert len([r for r in caplog.records if r.levelno >= logging.WARNING]) == 4 * 5
