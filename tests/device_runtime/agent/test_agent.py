import msgspec
import numpy as np
import pytest
from fleet import ARTIFACT, JOB, STEPS, first_adapter
from stage import FINE, HOT, NAME, ON_CELLULAR, Stage, locally, shifted

from fleetune.device_runtime.contracts.codecs import decode_update, encode_update
from fleetune.device_runtime.contracts.wire import (
    Chunk,
    Decline,
    DeviceStatus,
    Finished,
    Hello,
    Request,
    UpdateReady,
    Verdict,
    decode,
    device_topic,
)


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


@pytest.mark.parametrize("how", ["by a message", "by the retained status"])
def test_started_again_after_the_end_it_waits_until_the_job_goes_on(tmp_path, how):
    stage = Stage(tmp_path)
    stage.aggregator.status("one")
    stage.poll(2)
    if how == "by a message":
        stage.aggregator.say(Finished(job=JOB, reason="1 rounds are done"))
    stage.aggregator.status("one", finished=True)
    stage.poll()
    assert stage.device.agent.finished
    stage.device.kill()
    stage.device.start()
    stage.poll(2)
    assert stage.device.agent.finished == ""
    stage.aggregator.status("two")
    stage.aggregator.heard()
    stage.poll(2)
    assert len(stage.aggregator.heard(Hello)) == 1
    stage.aggregator.status("two", finished=True)
    stage.poll()
    assert stage.device.agent.finished == "the job is over", "of this session it was not told yet"


def test_a_fault_of_ours_costs_the_message_that_found_it_and_no_more(stage, monkeypatch, caplog):
    with monkeypatch.context() as patched:
        patched.setattr(stage.device.agent._assignments, "settle", lambda _: {}["x"])
        stage.aggregator.say(Verdict(job=JOB, round=7, digest="none", accepted=True))
        stage.poll(2)
    assert "down: KeyError: 'x'" in caplog.text
    assert stage.trained().round == 1


def test_an_aggregator_writes_no_line_into_the_log(stage):
    stage.aggregator.say(Finished(job=JOB, reason="over\nround 9: accepted\x1b[2J"))
    stage.poll()
    assert stage.device.agent.finished == "over?round 9: accepted?[2J"


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


def test_events_read_well(stage):
    stage.trained()
    offer, *_, trained = stage.device.events
    assert str(offer) == "round 1: offer: version 0"
    size = len(encode_update("fp32", {n: first_adapter()[n] for n in ("w", "b")}, first_adapter()))
    assert str(trained).startswith("round 1: trained: loss ")
    assert str(trained).endswith(f", size {size / 1e3:.1f} kB")


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


def test_a_flood_of_bad_messages_is_a_few_lines_in_the_log(stage, caplog):
    topic = stage.device.agent._identity.topics[0]
    for _ in range(200):
        stage.device.agent.take(topic, b"garbage", 1.0)
    assert caplog.text.count("dropped a message") == 5
