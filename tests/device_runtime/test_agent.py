import logging

import msgspec
import numpy as np
import pytest
from fleet import ARTIFACT, JOB, STEPS, Device, LinearTraining, first_adapter, points_of, workbench_of

from device_runtime.arrays import to_bytes
from device_runtime.codecs import decode_update, encode_update
from device_runtime.errors import ConfigError
from device_runtime.loopback import Loopback
from device_runtime.pause import Gate
from device_runtime.rules import Network, Reading, Rules, Temperature
from device_runtime.transfer import Outgoing, Pull
from device_runtime.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    DeviceStatus,
    Finished,
    Hello,
    LocalWork,
    Offer,
    Report,
    Request,
    UpdateReady,
    Verdict,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)

NAME = "device-3"


class Aggregator:
    """Speaks to one agent by hand."""

    def __init__(self, server):
        self.link = server.connect([device_topic(JOB, NAME, "up"), device_topic(JOB, NAME, "status")])

    def say(self, message):
        self.link.publish(device_topic(JOB, NAME, "down"), encode(message))

    def status(self, session="one", **changes):
        fields = {"job": JOB, "session": session, "online": True, "round": 1, "version": 0, **changes}
        self.link.publish(aggregator_topic(JOB), encode(AggregatorStatus(**fields)), retain=True)

    def heard(self, *kinds):
        messages = []
        while (found := self.link.receive(0)) is not None:
            messages.append(decode(found[1]))
        return [m for m in messages if isinstance(m, kinds or object)]

    def offer(self, number=1, *, adapter=None, **changes):
        self.outgoing = Outgoing(to_bytes(adapter or first_adapter()))
        fields = {"job": JOB, "round": number, "version": number - 1, "role": "train", "deadline_s": 0.0}
        fields |= {"work": LocalWork(steps=STEPS, seed=number), "adapter": self.outgoing.manifest, **changes}
        self.say(Offer(**fields))

    def verdict(self, update, *, accepted=True, reason=""):
        digest = update.payload.sha256 if isinstance(update, UpdateReady) else ""
        self.say(Verdict(job=JOB, round=update.round, digest=digest, accepted=accepted, reason=reason))


class Stage:
    """A device, its aggregator, and a clock."""

    def __init__(self, tmp_path, **options):
        self.server = Loopback()
        self.aggregator = Aggregator(self.server)
        self.device = Device(self.server, tmp_path, 3, **options).start()
        self.now = 0.0

    def poll(self, times=1):
        for _ in range(times):
            self.now += 0.01
            self.device.agent.poll(self.now)

    def until(self, kind):
        for _ in range(200):
            self.poll()
            if self.device.kinds()[-1:] == [kind]:
                return
        raise AssertionError(self.device.kinds())

    def trained(self, number=1, **changes):
        self.aggregator.offer(number, **changes)
        self.until("trained")
        self.poll()
        return self.aggregator.heard(UpdateReady)[-1]

    def pull(self, update):
        pull = Pull(update.payload, size_bytes_max=10**6, now=self.now)
        while not pull.done:
            if request := pull.due(self.now):
                self.aggregator.say(request)
            self.poll()
            for chunk in self.aggregator.heard(Chunk):
                pull.add(chunk, self.now)
        return pull.content()


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


def locally(seed, adapter=None):
    training = LinearTraining(points_of(3), LocalWork(steps=STEPS, seed=seed), adapter or first_adapter())
    while not training.done:
        training.step()
    return training.adapter


def shifted():
    return {name: (value + np.float32(0.25)).astype(np.float32) for name, value in first_adapter().items()}


def test_it_says_hello_and_that_it_is_online(stage):
    stage.poll(3)
    status, hello = stage.aggregator.heard()
    assert status == DeviceStatus(device_id=NAME, online=True)
    assert hello == Hello(device_id=NAME, artifact=ARTIFACT, num_samples=8)


def test_its_will_says_that_it_is_gone(stage):
    stage.poll()
    stage.device.kill()
    assert stage.aggregator.heard(DeviceStatus)[-1] == DeviceStatus(device_id=NAME, online=False)


def test_it_says_hello_again_after_a_reconnection_a_new_session_and_a_long_silence(stage):
    stage.poll()
    stage.aggregator.heard()
    stage.server.restart()
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("one")
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("one")
    stage.poll(2)
    assert stage.aggregator.heard(Hello) == []
    stage.now += 29
    stage.poll(2)
    assert stage.aggregator.heard(Hello) == []
    stage.now += 2
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1


def test_a_new_session_is_greeted_in_the_middle_of_training(stage):
    stage.aggregator.status("one")
    stage.poll(2)
    stage.aggregator.offer()
    stage.poll(2)
    assert stage.device.kinds() == ["offer"]
    stage.aggregator.heard()
    stage.aggregator.status("two")
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1


def test_it_trains_what_is_offered_and_delivers_it(stage):
    update = stage.trained()
    assert (update.round, update.version, update.codec, update.num_samples) == (1, 0, "fp32", 8)
    assert update.stats["loss"] > 0
    values = decode_update(stage.pull(update), first_adapter())
    expected = locally(1)
    assert values.keys() == {"w", "b"}, "a tensor that training did not touch does not travel"
    assert all(np.array_equal(values[n], expected[n]) for n in values)


def test_version_zero_is_not_fetched_and_another_is_fetched_once(stage):
    stage.trained(1)
    assert stage.aggregator.heard(Request) == []
    stage.aggregator.offer(2, adapter=shifted())
    stage.poll(2)
    (request,) = stage.aggregator.heard(Request)
    for chunk in stage.aggregator.outgoing.chunks(request):
        stage.aggregator.say(chunk)
    stage.until("trained")
    stage.aggregator.heard()
    stage.trained(3, adapter=shifted())
    assert stage.aggregator.heard(Request) == [], "it is kept by its digest"
    update = stage.trained(4, adapter=shifted())
    values = decode_update(stage.pull(update), shifted())
    assert np.array_equal(values["w"], locally(4, shifted())["w"])


def test_an_update_is_announced_until_there_is_a_verdict(stage):
    update = stage.trained()
    stage.now += 6
    stage.poll()
    assert stage.aggregator.heard(UpdateReady) == [update]
    stage.aggregator.verdict(update)
    stage.poll()
    assert stage.device.kinds()[-1] == "accepted"
    stage.now += 1000
    stage.poll(2)
    assert stage.aggregator.heard(UpdateReady) == []
    assert stage.device.outbox.pending() == []


def test_announcements_become_rarer(stage):
    stage.trained()
    stage.aggregator.heard()
    for _ in range(300):
        stage.now += 1
        stage.aggregator.status("one")
        stage.poll()
    assert 5 < len(stage.aggregator.heard(UpdateReady)) < 20


def test_who_pulls_needs_no_announcement(stage):
    update = stage.trained()
    stage.pull(update)
    stage.now += 14
    stage.poll(2)
    assert stage.aggregator.heard(UpdateReady) == []
    stage.now += 2
    stage.poll(2)
    assert len(stage.aggregator.heard(UpdateReady)) == 1, "the verdict may have got lost"


def test_a_new_aggregator_may_ask_for_the_same_again(stage):
    stage.aggregator.status("one")
    update = stage.trained()
    stage.aggregator.verdict(update)
    stage.poll()
    stage.aggregator.status("two")
    stage.poll()
    assert stage.trained().payload.sha256 == update.payload.sha256


def test_a_refused_update_is_let_go_of(stage, caplog):
    update = stage.trained()
    with caplog.at_level(logging.WARNING):
        stage.aggregator.verdict(update, accepted=False, reason="round 1 is closed")
        stage.poll()
    assert "round 1: refused: round 1 is closed" in caplog.text
    assert stage.device.outbox.pending() == []


def test_the_same_offer_again_is_not_trained_again(stage):
    stage.aggregator.offer()
    stage.poll(2)
    stage.aggregator.offer()
    stage.until("trained")
    assert stage.device.kinds() == ["offer", "trained"]
    stage.poll()
    stage.aggregator.heard()
    stage.aggregator.offer()
    stage.poll(2)
    (update,) = stage.aggregator.heard(UpdateReady)
    stage.aggregator.verdict(update)
    stage.poll()
    stage.aggregator.offer()
    stage.poll(2)
    assert stage.device.kinds() == ["offer", "trained", "accepted"]


def test_a_newer_offer_replaces_the_work_and_an_older_one_does_not(stage):
    stage.aggregator.offer(1)
    stage.poll(2)
    stage.aggregator.offer(2)
    stage.poll()
    stage.aggregator.offer(1)
    stage.until("trained")
    stage.poll()
    assert [u.round for u in stage.aggregator.heard(UpdateReady)] == [2]


def test_other_work_in_the_same_round_replaces_what_was_made(stage):
    stage.trained(1)
    update = stage.trained(1, work=LocalWork(steps=STEPS, seed=99))
    values = decode_update(stage.pull(update), first_adapter())
    assert np.array_equal(values["w"], locally(99)["w"])
    assert len(stage.device.outbox.pending()) == 1


@pytest.mark.parametrize("polls", [1, 2, 3, 4, 5, 6])
def test_a_killed_device_resumes_and_delivers_the_same(tmp_path, polls):
    stage = Stage(tmp_path)
    stage.aggregator.offer()
    stage.poll(polls)
    stage.device.kill()
    stage.device.start()
    if "trained" not in stage.device.kinds():
        stage.aggregator.offer()
        stage.until("trained")
    stage.poll()
    update = stage.aggregator.heard(UpdateReady)[-1]
    values = decode_update(stage.pull(update), first_adapter())
    assert np.array_equal(values["w"], locally(1)["w"])


def test_a_resumed_device_does_not_repeat_the_steps_of_its_checkpoint(tmp_path):
    stage = Stage(tmp_path)
    stage.aggregator.offer()
    while sum(e.kind == "step" for e in stage.device.events) < 3:
        stage.poll()
    stage.device.kill()
    stage.device.events.clear()
    stage.device.start()
    stage.trained()
    assert [e.values["step"] for e in stage.device.events if e.kind == "step"] == [3, 4]
    assert list(stage.device.folder.glob("work-*")) == []


def test_a_damaged_checkpoint_is_started_over(tmp_path, caplog):
    stage = Stage(tmp_path)
    stage.aggregator.offer()
    while not list(stage.device.folder.glob("work-*")):
        stage.poll()
    stage.device.kill()
    next(stage.device.folder.glob("work-*")).write_bytes(b"torn")
    stage.device.start()
    update = stage.trained()
    assert "round 1: starting afresh" in caplog.text
    assert np.array_equal(decode_update(stage.pull(update), first_adapter())["w"], locally(1)["w"])


def test_an_update_survives_the_device(stage):
    update = stage.trained()
    stage.device.kill()
    stage.device.start()
    stage.poll()
    assert stage.aggregator.heard(UpdateReady) == [update]


def test_chunks_become_smaller_when_the_server_takes_less(stage):
    update = stage.trained()
    stage.device.link.chunk_bytes = 1000
    stage.now += 10
    stage.poll()
    (smaller,) = stage.aggregator.heard(UpdateReady)
    assert smaller.payload.sha256 == update.payload.sha256
    assert smaller.payload.chunk_bytes == 1000
    assert stage.pull(smaller)


def test_what_a_lossy_codec_owes_is_added_next_time(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    first = stage.trained(1, work=work)
    sent = decode_update(stage.pull(first), first_adapter())["w"]
    owed = locally(1)["w"].astype(np.float64) - sent
    stage.aggregator.verdict(first)
    stage.poll()
    second = stage.trained(2, work=msgspec.structs.replace(work, codec="fp32"))
    conveyed = decode_update(stage.pull(second), first_adapter())["w"]
    np.testing.assert_array_equal(conveyed, (locally(1)["w"] + owed).astype(np.float32))


def test_what_a_refused_update_owed_is_forgotten(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    first = stage.trained(1, work=work)
    stage.aggregator.verdict(first, accepted=False, reason="late")
    stage.poll()
    second = stage.trained(2, work=msgspec.structs.replace(work, codec="fp32"))
    np.testing.assert_array_equal(decode_update(stage.pull(second), first_adapter())["w"], locally(1)["w"])


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"w": np.zeros(3000, np.float32)}, "missing"),
        ({**first_adapter(), "w": np.zeros(3, np.float32)}, "w: float32[3], expected float32[3000]"),
        ({**first_adapter(), "x": np.zeros(3, np.float32)}, "x: unexpected"),
        ({**first_adapter(), "w": np.zeros(100_000, np.float32)}, "transfer refused: 4"),
    ],
)
def test_an_adapter_that_does_not_fit_is_declined(stage, adapter, said):
    stage.aggregator.offer(2, adapter=adapter)
    stage.poll(2)
    declined = stage.aggregator.heard(Request, Decline)
    if isinstance(declined[0], Request):
        for chunk in stage.aggregator.outgoing.chunks(declined[0]):
            stage.aggregator.say(chunk)
        stage.poll(2)
        declined = stage.aggregator.heard(Decline)
    assert said in declined[0].reason
    assert not list(stage.device.folder.glob("adapter*"))


def test_work_that_cannot_be_done_is_declined_once(tmp_path):
    def diverging(training):
        def step():
            raise ConfigError("step 0: the loss is nan; try a lower learning rate")

        training.step = step
        return training

    stage = Stage(tmp_path, workbench=workbench_of(3, wrap=diverging))
    stage.aggregator.offer()
    stage.poll(3)
    stage.aggregator.offer()
    stage.poll(3)
    (declined,) = stage.aggregator.heard(Decline)
    assert (declined.round, declined.reason) == (1, "step 0: the loss is nan; try a lower learning rate")


def test_an_evaluating_device_reports_until_there_is_a_verdict(tmp_path):
    stage = Stage(tmp_path, role="evaluate")
    stage.aggregator.offer(1, role="evaluate")
    stage.until("evaluated")
    stage.poll()
    (report,) = stage.aggregator.heard(Report)
    expected = workbench_of(3).evaluate(None, first_adapter())
    assert (report.loss, report.accuracy, report.num_samples) == tuple(expected)
    stage.now += 10
    stage.poll()
    assert stage.aggregator.heard(Report) == [report]
    stage.aggregator.verdict(report)
    stage.now += 100
    stage.poll(2)
    assert stage.aggregator.heard(Report) == []


@pytest.mark.parametrize("is_error", [False, True])
def test_it_stops_when_told_so(stage, is_error):
    stage.poll()
    stage.aggregator.say(Finished(job=JOB, reason="3 rounds are done", is_error=is_error))
    assert stage.device.agent.poll(1.0) is False
    assert stage.device.agent.finished == "3 rounds are done"
    assert stage.device.agent.is_unwanted == is_error


def test_the_retained_end_of_its_job_stops_it_and_that_of_an_earlier_one_does_not(tmp_path):
    stage = Stage(tmp_path)
    stage.aggregator.status("earlier", finished=True)
    stage.poll(2)
    assert stage.device.agent.finished == ""
    stage.aggregator.status("now")
    stage.poll(2)
    stage.device.kill()
    stage.aggregator.status("now", finished=True)
    stage.device.start()
    stage.poll()
    assert stage.device.agent.finished == "the job is over"


@pytest.mark.parametrize(
    "message",
    [
        Finished(job="another"),
        Verdict(job=JOB, round=7, digest="none", accepted=True),
        Hello(device_id="x", artifact=ARTIFACT),
        Request(sha256="0" * 64, missing=b"\xff"),
        Chunk(sha256="0" * 64, index=0, data=b"x"),
    ],
)
def test_a_message_out_of_place_changes_nothing(stage, message):
    stage.aggregator.say(message)
    stage.aggregator.link.publish(device_topic(JOB, NAME, "down"), b"\xff garbage")
    stage.aggregator.offer(1, role="evaluate")
    stage.poll(3)
    assert stage.device.kinds() == []
    assert stage.trained().round == 1


def test_damaged_chunks_are_asked_for_again(stage):
    stage.aggregator.offer(2, adapter=shifted())
    stage.poll(2)
    (request,) = stage.aggregator.heard(Request)
    (chunk,) = stage.aggregator.outgoing.chunks(request)
    stage.aggregator.say(msgspec.structs.replace(chunk, data=chunk.data[:-1] + b"\0"))
    stage.poll()
    stage.now += 30
    stage.poll(2)
    assert stage.aggregator.heard(Request)
    stage.aggregator.say(chunk)
    stage.until("trained")


def test_while_disconnected_it_trains_on_and_announces_later(stage):
    stage.aggregator.offer()
    stage.poll(2)
    stage.device.link.connected = False
    stage.until("trained")
    stage.poll(2)
    assert stage.aggregator.heard(UpdateReady) == []
    stage.device.link.connected = True
    stage.server.restart()
    stage.poll(2)
    assert len(stage.aggregator.heard(UpdateReady)) == 1


def test_events_read_well(stage):
    stage.trained()
    offer, *_, trained = stage.device.events
    assert str(offer) == "round 1: offer: version 0"
    size = len(encode_update("fp32", {n: first_adapter()[n] for n in ("w", "b")}, first_adapter()))
    assert str(trained).startswith("round 1: trained: loss ")
    assert str(trained).endswith(f"size_bytes {size}")


HOT = Reading(temperature=90.0, network="wired")
FINE = Reading(temperature=50.0, network="wired")
ON_CELLULAR = Reading(temperature=50.0, network="cellular")


class Weather:
    """What the sensors of a pretended system say."""

    def __init__(self):
        self.reading = FINE

    def gate(self):
        rules = Rules(temperature=Temperature(max_c=70), network=Network(), period_s=0, resume_after_s=0)
        return Gate(rules, lambda: self.reading)


@pytest.fixture
def weather():
    return Weather()


@pytest.fixture
def careful(tmp_path, weather):
    """A device with rules."""
    return Stage(tmp_path, gate=weather.gate())


def test_a_pause_takes_effect_before_the_next_step_and_changes_nothing(careful, weather):
    careful.aggregator.offer()
    careful.poll(2)
    steps = [event.kind for event in careful.device.events].count("step")
    assert 0 < steps < STEPS
    weather.reading = HOT
    for _ in range(50):
        careful.now += 100
        assert careful.device.agent.poll(careful.now) is False
    assert [event.kind for event in careful.device.events].count("step") == steps
    assert careful.device.agent.is_paused
    weather.reading = FINE
    careful.until("trained")
    careful.poll()
    assert careful.device.kinds() == ["offer", "paused", "resumed", "trained"]
    update = careful.aggregator.heard(UpdateReady)[-1]
    values = decode_update(careful.pull(update), first_adapter())
    assert all(np.array_equal(values[name], locally(1)[name]) for name in values)


def test_a_paused_device_says_why_in_its_status_and_answers_all_the_same(careful, weather):
    update = careful.trained()
    weather.reading = HOT
    careful.poll()
    status = careful.aggregator.heard(DeviceStatus)[-1]
    assert status == DeviceStatus(device_id=NAME, online=True, paused="temperature 90.0 C is above 70 C")
    assert careful.pull(update), "chunks are served"
    careful.server.restart()
    careful.poll(2)
    again = careful.aggregator.heard(DeviceStatus)
    assert [s.paused for s in again][-1] == "temperature 90.0 C is not yet down to 65 C"
    weather.reading = FINE
    careful.poll()
    assert careful.aggregator.heard(DeviceStatus) == [DeviceStatus(device_id=NAME, online=True)]


def test_readers_that_know_no_pause_read_the_status_and_theirs_is_read(careful):
    class OldStatus(msgspec.Struct, frozen=True, kw_only=True, tag="device_status"):
        v: int
        device_id: str
        online: bool

    new = careful.device.identity.status(online=True, paused="hot")
    assert msgspec.msgpack.decode(new, type=OldStatus).online
    old = msgspec.msgpack.encode(OldStatus(v=1, device_id=NAME, online=True))
    assert decode(old) == DeviceStatus(device_id=NAME, online=True)


def test_it_takes_offers_and_fetches_in_a_pause_and_checkpoints_what_it_has(careful, weather):
    weather.reading = HOT
    careful.aggregator.offer(2, adapter=shifted())
    careful.poll(2)
    (request,) = careful.aggregator.heard(Request)
    for chunk in careful.aggregator.outgoing.chunks(request):
        careful.aggregator.say(chunk)
    careful.poll(3)
    assert careful.device.kinds() == ["paused", "offer"]
    weather.reading = FINE
    careful.poll(1)
    weather.reading = HOT
    careful.poll(1)
    (checkpoint,) = careful.device.folder.glob("work-*")
    assert checkpoint.stat().st_size
    weather.reading = FINE
    careful.until("trained")


def test_over_a_network_that_it_may_not_use_only_small_messages_go(careful, weather):
    update = careful.trained(1)
    weather.reading = ON_CELLULAR
    careful.poll()
    careful.aggregator.heard()
    careful.aggregator.say(Request(sha256=update.payload.sha256, missing=b"\1", limit=1))
    careful.aggregator.offer(2, adapter=shifted())
    careful.now += 1000
    careful.poll(3)
    assert {type(message) for message in careful.aggregator.heard()} <= {Hello, DeviceStatus}
    weather.reading = FINE
    careful.poll(2)
    heard = careful.aggregator.heard(UpdateReady, Request)
    assert {type(message) for message in heard} == {UpdateReady, Request}


def test_a_round_is_given_up_a_little_after_its_deadline_and_the_next_is_taken(careful, weather):
    weather.reading = HOT
    careful.aggregator.offer(1, deadline_s=60.0)
    careful.poll()
    careful.aggregator.heard()
    careful.now += 62
    careful.poll()
    assert careful.aggregator.heard(Decline) == [], "the aggregator may extend it"
    careful.now += 4
    careful.poll()
    (decline,) = careful.aggregator.heard(Decline)
    assert decline.reason == "paused: temperature 90.0 C is not yet down to 65 C"
    assert not careful.device.agent.is_paused
    weather.reading = FINE
    assert careful.trained(2).round == 2


def test_an_extended_round_is_waited_for_and_one_without_a_deadline_for_ever(careful, weather):
    weather.reading = HOT
    for _ in range(5):
        careful.aggregator.offer(1, deadline_s=60.0)
        careful.now += 59
        careful.poll()
    careful.now += 59
    careful.aggregator.offer(2)
    careful.poll()
    careful.now += 10**7
    careful.poll()
    weather.reading = FINE
    careful.until("trained")
    assert "declined" not in careful.device.kinds()


def test_a_device_that_is_not_paused_does_not_mind_the_deadline(careful):
    careful.aggregator.offer(1, deadline_s=1.0)
    careful.poll()
    careful.now += 1000
    careful.until("trained")


def test_an_evaluating_device_waits_too(tmp_path, weather):
    stage = Stage(tmp_path, role="evaluate", gate=weather.gate())
    weather.reading = HOT
    stage.aggregator.offer(role="evaluate")
    stage.poll(5)
    assert stage.device.kinds() == ["paused", "offer"]
    weather.reading = FINE
    stage.until("evaluated")


def test_a_pause_without_work_is_told_and_is_none_of_the_agent(careful, weather):
    weather.reading = HOT
    careful.poll()
    assert str(careful.device.events[-1]) == "round 0: paused: temperature 90.0 C is above 70 C"
    assert not careful.device.agent.is_paused
