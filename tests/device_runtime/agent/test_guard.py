"""A device that trusts a key: what strangers, recorders and aggregators that began anew can make it do."""

import logging

import msgspec
import pytest
from fleet import JOB
from golden_wire import MESSAGES, filled
from signed import DOWN, KEY, NEXT_KEY, STRANGERS, Signatory, SignedStage, trusting

from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Decline,
    Finished,
    Hello,
    Offer,
    Request,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.errors import StateError

STATUS = aggregator_topic(JOB)


@pytest.fixture
def stage(tmp_path):
    return SignedStage(tmp_path)


def offers(stage):
    return [
        topic_payload
        for topic_payload in stage.aggregator.said
        if isinstance(decode(topic_payload[1]), Offer)
    ]


def restart(stage):
    stage.device.kill()
    stage.device.start()


def test_signed_work_is_done_and_its_verdict_taken(stage):
    stage.aggregator.status()
    update = stage.trained()
    assert stage.pull(update)
    stage.aggregator.verdict(update)
    stage.poll()
    assert stage.device.kinds() == ["aggregator", "offer", "trained", "accepted"]
    stage.aggregator.say(Finished(job=JOB, reason="done"))
    stage.poll()
    assert stage.device.agent.finished == "done"


@pytest.mark.parametrize(
    "kind", [kind for kind in MESSAGES if kind is not Chunk], ids=lambda kind: kind.__name__
)
@pytest.mark.parametrize("topic", [DOWN, STATUS])
def test_nothing_unsigned_gets_further_than_the_door(stage, kind, topic, caplog, monkeypatch):
    reached = []
    monkeypatch.setattr(stage.device.agent, "_dispatch", lambda *args: reached.append(args))
    message = msgspec.structs.replace(
        filled(kind), **({"job": JOB} if "job" in kind.__struct_fields__ else {})
    )
    stage.device.agent.take(topic, encode(message), 1.0)
    assert reached == []
    assert f"{kind.__name__} is not signed; job 'job' takes what key {trusting().names} signs" in caplog.text


def test_a_stranger_who_may_write_everywhere_changes_nothing_and_is_logged_once_a_kind(stage, caplog):
    stage.aggregator.status()
    update = stage.trained()
    stranger = stage.stranger
    for _ in range(50):
        stranger.offer(7)
        stranger.verdict(update)
        stranger.say(Finished(job=JOB, reason="go home", is_error=True))
        stranger.say(Request(sha256=update.payload.sha256, missing=b"\xff"))
        stranger.status("one", finished=True)
        stage.poll()
    assert stage.device.kinds() == ["aggregator", "offer", "trained"]
    assert not stage.device.agent.finished
    assert stage.aggregator.heard(Chunk) == []
    lines = [record.message for record in caplog.records]
    assert sorted(line.split(": ")[1].split(" is")[0] for line in lines) == [
        "AggregatorStatus", "Finished", "Offer", "Request", "Verdict",
    ]  # fmt: skip
    stage.aggregator.verdict(update)
    stage.poll()
    assert stage.device.kinds()[-1] == "accepted"


def test_a_flood_is_counted_once_a_minute(stage, caplog):
    for number in range(500):
        stage.device.agent.take(DOWN, encode(Finished(job=JOB)), number / 10)
    stage.device.agent.take(DOWN, encode(Finished(job=JOB)), 61.0)
    assert [record.message for record in caplog.records][1] == (
        f"{DOWN} (Finished, not signed): 499 more messages that deserved a line"
    )
    assert len(caplog.records) == 3


def test_a_retained_end_of_a_stranger_is_no_end_also_after_a_restart(stage, caplog):
    stage.aggregator.status("one")
    stage.poll()
    stage.stranger.status("one", finished=True)
    stage.poll()
    restart(stage)
    stage.poll(3)
    assert stage.device.agent.finished == ""
    assert caplog.text.count("AggregatorStatus is not signed") == 2, "once in each life"


def test_an_aggregator_that_knocks_is_no_stranger(stage, caplog):
    knock = AggregatorStatus(job=JOB, session="", online=False, round=0, version=0)
    stage.device.agent.take(STATUS, encode(knock), 1.0)
    assert caplog.text == ""


def test_another_key_a_changed_byte_and_another_devices_message_are_named(stage, caplog):
    other = Signatory(stage.server, key=STRANGERS)
    other.offer(1)
    stage.aggregator.say(Finished(job=JOB))
    topic, payload = stage.aggregator.said[-1]
    elsewhere = device_topic(JOB, "device-4", "down")
    moved = stage.aggregator.signer.seal(elsewhere, encode(Finished(job=JOB)))
    for said in (payload[:-1] + bytes([payload[-1] ^ 1]), moved):
        stage.device.agent.take(topic, said, 1.0)
    stage.device.agent.take(DOWN, other.said[-1][1], 1.0)
    assert not stage.device.agent.finished
    key, strangers = trusting().names, trusting(STRANGERS).names
    assert (
        f"{DOWN}: key {key} did not sign this for this topic; job 'job' takes what key {key} signs"
        in caplog.text
    )
    assert f"{DOWN}: key {strangers} signed it; job 'job' takes what key {key} signs" in caplog.text


def test_keys_are_rotated_without_a_pause(tmp_path):
    stage = SignedStage(tmp_path, trusted=trusting(KEY, NEXT_KEY))
    assert stage.trained(1).round == 1
    stage.aggregator.restart(2, key=NEXT_KEY)
    assert stage.trained(2).round == 2


def test_a_device_without_a_key_takes_signed_work_too(tmp_path):
    stage = SignedStage(tmp_path)
    stage.device.kill()
    stage.device.options.pop("trusted")
    stage.device.start()
    assert stage.trained().round == 1


def test_an_old_offer_said_again_is_refused_also_after_a_kill(stage, caplog):
    for number in (1, 2):
        update = stage.trained(number)
        stage.aggregator.verdict(update)
        stage.poll()
    (_, first), (_, second) = offers(stage)
    for _ in range(2):
        stage.aggregator.again(DOWN, first)
        stage.poll(5)
        restart(stage)
    assert stage.device.kinds().count("offer") == 2
    assert "message 0 of the aggregator's start 1 is older than message" in caplog.text
    assert "it was recorded and said again" in caplog.text
    stage.aggregator.again(DOWN, second)
    stage.poll()
    assert stage.device.kinds().count("offer") == 3, (
        "the newest is the one that a device that was killed needs"
    )


def test_a_version_that_is_rolled_back_is_declined_and_named(stage, caplog):
    for number in (1, 2, 3):
        stage.trained(number)
    restart(stage)
    stage.aggregator.heard()
    stage.aggregator.restart(9)
    stage.aggregator.offer(4, version=1)
    stage.aggregator.offer(2, version=3)
    stage.poll(3)
    declined = stage.aggregator.heard(Decline)
    assert [(d.round, d.reason) for d in declined] == [
        (n, f"round {n} from version {v} is older than what this device has taken in job 'job', round 3 from version 2; "
            "a job that begins anew needs another name") for n, v in ((4, 1), (2, 3))
    ]  # fmt: skip
    assert caplog.text.count("declined") == 1, "the second within the minute is counted"
    assert stage.device.kinds().count("offer") == 3


def test_a_job_that_begins_anew_in_an_empty_folder_is_told_why_nobody_works(stage, caplog):
    stage.aggregator.restart(3)
    for number in (1, 2):
        stage.trained(number)
    stage.aggregator.heard()
    stage.aggregator.restart(1)
    stage.aggregator.status("anew")
    stage.aggregator.offer(1)
    stage.poll(3)
    (declined,) = stage.aggregator.heard(Decline)
    assert "a job that begins anew needs another name" in declined.reason
    assert "the job began anew in another folder and needs another name" in caplog.text


def test_repeats_of_an_aggregator_that_restarts_are_taken(stage):
    """A reconnection, a kill of either side, and more rounds after the end."""
    stage.aggregator.status("one")
    stage.aggregator.offer(1)
    stage.poll(2)
    stage.aggregator.offer(1)
    restart(stage)
    stage.aggregator.restart(2)
    stage.aggregator.status("two")
    update = stage.trained(1)
    stage.aggregator.verdict(update)
    stage.poll()
    stage.aggregator.say(Finished(job=JOB, reason="done"))
    stage.aggregator.status("two", finished=True)
    stage.poll()
    assert stage.device.agent.finished
    restart(stage)
    stage.poll(2)
    assert not stage.device.agent.finished
    stage.aggregator.restart(3)
    stage.aggregator.status("three")
    assert stage.trained(2).round == 2


@pytest.mark.parametrize("is_error", [False, True])
def test_a_recorded_end_ends_a_device_once(stage, is_error):
    stage.aggregator.status()
    stage.trained(1)
    stage.aggregator.say(Finished(job=JOB, reason="go", is_error=is_error))
    stage.poll()
    assert stage.device.agent.finished
    restart(stage)
    stage.aggregator.again(*stage.aggregator.said[-1])
    stage.poll(2)
    assert not stage.device.agent.finished
    assert stage.trained(2).round == 2


def test_a_status_of_an_earlier_start_is_refused(stage):
    stage.aggregator.status("one")
    stage.aggregator.restart(2)
    stage.aggregator.status("two")
    stage.poll(2)
    stage.aggregator.heard()
    stage.device.kill()
    stage.aggregator.link.publish(*stage.aggregator.said[0], retain=True)
    stage.device.start()
    stage.poll(3)
    assert not stage.device.agent.has_status
    stage.aggregator.link.publish(*stage.aggregator.said[1], retain=True)
    stage.poll(3)
    assert stage.device.agent.has_status


def test_an_older_status_of_the_same_start_is_the_retained_one(stage):
    """It was published before the offer that the device has taken."""
    stage.aggregator.status("one")
    stage.trained(1)
    restart(stage)
    stage.poll(2)
    assert stage.device.agent.has_status


def test_a_strangers_chunks_keep_no_device_from_its_hello(stage):
    stage.poll()
    stage.aggregator.heard()
    for _ in range(40):
        stage.now += 1.0
        stage.stranger.say(Chunk(sha256="0" * 64, index=0, data=b"x"))
        stage.device.agent.poll(stage.now)
    assert len(stage.aggregator.heard(Hello)) == 1


def test_an_evaluator_that_trained_before_begins_at_version_0(tmp_path):
    stage = SignedStage(tmp_path)
    stage.trained(5)
    stage.device.kill()
    stage.device.identity = stage.device.identity._replace(role="evaluate")
    stage.device.start()
    for version in (0, 3):
        stage.aggregator.offer(version, version=version, role="evaluate")
        stage.poll(5)
        assert stage.device.kinds()[-1] == "evaluated"
    stage.aggregator.heard()
    stage.aggregator.offer(2, version=2, role="evaluate")
    stage.poll(5)
    assert "version 2 is older" in stage.aggregator.heard(Decline)[0].reason


def test_what_was_taken_is_the_jobs_whatever_the_artifact(tmp_path):
    stage = SignedStage(tmp_path)
    stage.trained(5)
    recorded = offers(stage)[0]
    stage.aggregator.restart(2)
    stage.trained(6)
    stage.device.kill()
    stage.device.identity = stage.device.identity._replace(artifact="b" * 64)
    stage.device.start()
    before = stage.device.kinds().count("offer")
    stage.aggregator.again(*recorded)
    stage.poll(3)
    assert stage.device.kinds().count("offer") == before


@pytest.mark.parametrize("content", [b"\xff", b"\x93\x01\x02\x03", b"", b"\x81\xa5start\xff"])
def test_a_damaged_memory_is_refused_with_the_way_out(tmp_path, content):
    stage = SignedStage(tmp_path)
    stage.device.outbox.remember(f"signed/{JOB}", content)
    stage.device.kill()
    if content:
        with pytest.raises(
            StateError, match=r"has taken in job 'job' is damaged: .*; move its state folder away"
        ):
            stage.device.start()
    else:
        stage.device.start()


def test_the_guard_keeps_its_word_when_the_disk_is_full(stage, monkeypatch):
    stage.poll()

    def full(*_):
        raise StateError("disk full")

    monkeypatch.setattr(stage.device.outbox, "remember", full)
    stage.aggregator.offer(1)
    with pytest.raises(StateError, match="disk full"):
        stage.poll()
    assert stage.device.kinds() == []


def test_no_key_and_no_signature_is_in_the_log(stage, caplog):
    caplog.set_level(logging.DEBUG)
    Signatory(stage.server, key=STRANGERS).offer(1)
    stage.trained()
    secret = KEY.private_bytes_raw()
    assert secret.hex() not in caplog.text
    assert repr(secret) not in caplog.text
