import msgspec
import numpy as np
import pytest
from fleet import ARTIFACT, JOB, first_adapter
from rounds_by_hand import task, update_of
from stranger import Stranger, good_payload

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.service.uploads import noted_of
from fleetune.broker.tasks import Noted
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import DeviceStatus, Hello, Request, Verdict, decode, device_topic


def test_a_good_update_is_durable_before_it_is_acknowledged(tmp_path):
    stranger = Stranger(tmp_path, clients=2, min_clients=1)
    other = Hello(device_id="other", artifact=ARTIFACT, num_samples=5)
    stranger.hello()
    stranger.say(other, name="other")
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]
    stranger.aggregator.kill()
    again = stranger.aggregator.start(2.0)
    assert again.ledger.past().accepted.keys() == {"train-1-device-0"}
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True], "the same update again"
    assert len(list(again.ledger.accepted())) == 1


def test_the_verdict_leaves_after_the_ledger_has_the_update(tmp_path):
    stranger = Stranger(tmp_path, clients=2, min_clients=1)
    kept = []

    def watched(topic, payload):
        if isinstance(decode(payload), Verdict):
            kept.append("train-1-device-0" in stranger.aggregator.ledger.past().accepted)
        return (payload,)

    stranger.server.disturb = watched
    stranger.hello()
    stranger.say(Hello(device_id="other", artifact=ARTIFACT, num_samples=5), name="other")
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]
    assert kept == [True]


def test_a_device_that_names_no_task_is_understood(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello()
    (verdict,) = stranger.deliver(good_payload(), task_id="")
    assert (verdict.accepted, verdict.task_id) == (True, "train-1-device-0")


def test_an_update_of_another_task_is_refused(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello()
    (verdict,) = stranger.deliver(good_payload(), task_id="../x")
    assert (verdict.accepted, verdict.task_id) == (False, "../x")
    assert verdict.reason == "it answers task '../x'; this device's is 'train-1-device-0'"


def nan_payload():
    packed = bytearray(good_payload())
    at = packed.rindex(np.float32(first_adapter()["w"][0] + np.float32(1)).tobytes())
    packed[at : at + 4] = np.float32(np.nan).tobytes()
    return bytes(packed)


def huge_payload():
    adapter = first_adapter()
    return encode_update("fp32", {"w": np.full_like(adapter["w"], 1e30)}, adapter)


def misshapen_payload():
    adapter = {"w": np.zeros(7, np.float32)}
    return encode_update("fp32", adapter, adapter)


def foreign_payload():
    adapter = {"x": np.zeros(7, np.float32)}
    return encode_update("fp32", adapter, adapter)


@pytest.mark.parametrize(
    ("payload", "changes", "said"),
    [
        (nan_payload(), {}, "w: NaN or infinity"),
        (huge_payload(), {}, "implausible update: w:"),
        (misshapen_payload(), {}, "w: shape [7], expected [3000]"),
        (foreign_payload(), {}, "'x': unknown tensor"),
        (b"garbage", {}, "malformed update"),
        (b"", {}, "malformed update"),
        (bytes(100_000), {}, "transfer refused: 100000 bytes"),
        (good_payload(), {"num_samples": 0}, "0 samples"),
        (good_payload(), {"num_samples": 2**30}, "1073741824 samples"),
        (good_payload(), {"codec": "int8"}, "its codec is 'int8'"),
        (good_payload(), {"version": 3}, "it starts from version 3"),
        (good_payload(), {"round": 2}, "round 2 is unknown"),
    ],
)
def test_a_bad_update_is_refused_with_its_reason(tmp_path, payload, changes, said):
    stranger = Stranger(tmp_path)
    stranger.hello()
    verdicts = stranger.deliver(payload, **changes)
    assert [v.accepted for v in verdicts] == [False]
    assert said in verdicts[0].reason
    assert stranger.aggregator.ledger.past().accepted == {}


def test_a_wrong_codec_inside_the_payload_is_refused(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello()
    adapter = first_adapter()
    assert "codec" in stranger.deliver(encode_update("int8", adapter, adapter))[0].reason


def test_a_device_that_was_never_asked_is_refused(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.say(Hello(device_id="asked", artifact=ARTIFACT, num_samples=5), name="asked")
    assert stranger.deliver(good_payload())[0].reason == "device 'device-0' was not asked in round 1"


def test_a_late_update_is_refused(tmp_path):
    stranger = Stranger(tmp_path, clients=2, min_clients=1, patience=Patience(deadline_s=10), rounds=2)
    stranger.hello()
    stranger.say(Hello(device_id="late", artifact=ARTIFACT, num_samples=5), name="late")
    stranger.deliver(good_payload())
    stranger.now = 50.0
    stranger.aggregator.poll(stranger.now)
    stranger.name = "late"
    late = stranger.server.connect([device_topic(JOB, "late", "down")])
    stranger.link = late
    assert stranger.deliver(good_payload())[0].reason == "round 1 is closed"


def test_a_pull_cut_off_by_the_deadline_is_answered(tmp_path):
    stranger = Stranger(tmp_path, clients=2, min_clients=1, patience=Patience(deadline_s=10), rounds=2)
    stranger.hello()
    stranger.say(Hello(device_id="late", artifact=ARTIFACT, num_samples=5), name="late")
    stranger.deliver(good_payload())
    late = stranger.server.connect([device_topic(JOB, "late", "down")])
    stranger.say(stranger.ready(good_payload(), device_id="late"), name="late")
    stranger.now = 50.0
    stranger.aggregator.poll(stranger.now)
    stranger.link = late
    assert [v.reason for v in stranger.heard(Verdict)] == ["round 1 is closed"]


@pytest.mark.parametrize(
    "change", [{"index": 99}, {"index": -1}, {"data": b"short"}, {"data": b"x" * 100_000}]
)
def test_a_damaged_chunk_is_dropped_and_asked_for_again(tmp_path, change):
    stranger = Stranger(tmp_path)
    stranger.hello()
    payload = good_payload()
    stranger.say(stranger.ready(payload))
    (request,) = stranger.heard(Request)
    (chunk,) = Outgoing(payload).chunks(request)
    stranger.say(msgspec.structs.replace(chunk, **change))
    stranger.now += 60
    stranger.aggregator.poll(stranger.now)
    assert stranger.heard(Request), "asked again"
    stranger.say(chunk)
    assert [v.accepted for v in stranger.heard(Verdict)] == [True]


def test_an_update_that_a_codec_stumbles_over_is_refused(tmp_path, monkeypatch):
    stranger = Stranger(tmp_path)
    stranger.hello()
    with monkeypatch.context() as patched:
        patched.setattr(stranger.aggregator.service._versions, "add", lambda *_: 1 // 0)
        (verdict,) = stranger.deliver(good_payload())
    assert (verdict.accepted, verdict.reason) == (
        False,
        "ZeroDivisionError: integer division or modulo by zero",
    )


@pytest.mark.parametrize("fetch_s", [float("nan"), float("inf"), 1e300, -1.0, 0.0])
def test_a_fetch_that_cannot_have_taken_so_long_is_not_noted(fetch_s):
    given = task("a", 1)
    lie = update_of(given, b"payload", fetch_seconds=fetch_s)
    assert noted_of(lie, given, 400, upload_s=2.0) == Noted(bytes_up=7, seconds_up=2.0)
    told = update_of(given, b"payload", fetch_seconds=0.5)
    assert noted_of(told, given, 0, upload_s=2.0) == Noted(bytes_up=7, seconds_up=2.0), "size not known"
    whole = noted_of(told, given, 400, upload_s=-1.0)
    assert whole == Noted(bytes_down=400, seconds_down=0.5, bytes_up=7)


def test_a_histogram_that_nobody_asked_for_is_not_noted():
    given = task("a", 1)
    told = msgspec.structs.replace(update_of(given, b"x"), histogram=[1, 2])
    assert noted_of(told, given, 0, upload_s=0.0).histogram == ()
    asked = given._replace(work=msgspec.structs.replace(given.work, histogram=True))
    assert noted_of(told, asked, 0, upload_s=0.0).histogram == (1, 2)


def _sends_a_part(stranger, **changes):
    """Announce in two chunks, and send the first."""
    outgoing = Outgoing(good_payload(), chunk_bytes=len(good_payload()) - 1)
    ready = stranger.ready(good_payload(), **changes)
    stranger.say(msgspec.structs.replace(ready, payload=outgoing.manifest))
    for request in stranger.heard(Request):
        stranger.say(next(outgoing.chunks(request)))


def test_bytes_of_an_update_that_was_given_up_are_not_told_of_the_next(tmp_path, caplog):
    stranger = Stranger(tmp_path, clients=2, min_clients=1, patience=Patience(deadline_s=10), rounds=2)
    other = stranger.beside("other")
    stranger.hello()
    other.hello()
    _sends_a_part(stranger)
    assert [v.accepted for v in other.deliver(good_payload())] == [True]
    stranger.now = 50.0
    stranger.aggregator.poll(stranger.now)
    assert [v.reason for v in stranger.heard(Verdict)] == ["round 1 is closed"]
    stranger.hello()
    verdicts = stranger.deliver(good_payload(), round=2, version=1, task_id="")
    assert [v.accepted for v in verdicts] == [True]
    assert "times its bytes came" not in caplog.text


def test_bytes_of_an_update_that_was_refused_are_not_told_of_the_next(tmp_path, caplog):
    stranger = Stranger(tmp_path)
    stranger.hello()
    assert [v.accepted for v in stranger.deliver(nan_payload())] == [False]
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]
    assert "times its bytes came" not in caplog.text


@pytest.mark.parametrize(("connection", "is_asked"), [("first", False), ("second", True), ("", True)])
def test_only_another_connection_has_an_upload_asked_for_again(tmp_path, connection, is_asked):
    stranger = Stranger(tmp_path)
    stranger.hello(connection="first")
    _sends_a_part(stranger)
    stranger.heard(Request)
    stranger.hello(connection=connection)
    assert bool(stranger.heard(Request)) is is_asked


def test_of_who_is_gone_no_connection_is_remembered(tmp_path):
    stranger = Stranger(tmp_path)
    stranger.hello(connection="first")
    stranger.say(DeviceStatus(device_id=stranger.name, online=False))
    assert stranger.aggregator.service._connection_of == {}
