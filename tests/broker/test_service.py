import logging

import msgspec
import numpy as np
import pytest
from fleet import (
    ARTIFACT,
    JOB,
    Aggregator,
    Device,
    LinearTraining,
    World,
    first_adapter,
    in_process,
    points_of,
    settings_of,
    workbench_of,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load

from broker.settings import Patience
from broker.strategies import STRATEGIES
from device_runtime.arrays import to_bytes
from device_runtime.codecs import encode_update
from device_runtime.loopback import Loopback
from device_runtime.pause import Gate
from device_runtime.rules import Reading, Rules, Temperature
from device_runtime.transfer import Outgoing
from device_runtime.wire import (
    AggregatorStatus,
    Chunk,
    Finished,
    Hello,
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

FOUR = (0, 1, 2, 3)


def world(tmp_path, *, numbers=FOUR, disturb=None, seed=0, evaluate=False, **changes):
    server = Loopback(disturb=disturb)
    changes = {"clients": len(numbers), "min_clients": len(numbers), **changes}
    aggregator = Aggregator(server, tmp_path, **changes).start()
    devices = [Device(server, tmp_path, n).start() for n in numbers]
    if evaluate:
        devices.append(Device(server, tmp_path, 9, name="eval", role="evaluate").start())
    return World(server, aggregator, devices, seed=seed)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_wire_gives_what_one_process_gives_to_the_bit(tmp_path, strategy):
    done = world(tmp_path, strategy=strategy).run()
    for version in (1, 2, 3):
        expected = in_process(FOUR, rounds=version, settings=settings_of(strategy=strategy))
        assert done.aggregator.version(version) == expected


@pytest.mark.parametrize("seed", [1, 2])
def test_whatever_the_order_of_arrival(tmp_path, seed):
    done = world(tmp_path, seed=seed).run()
    assert done.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


def test_one_device_and_one_round_is_local_training(tmp_path):
    done = world(tmp_path, numbers=(2,), rounds=1, seed=5).run()
    local = LinearTraining(points_of(2), settings_of().work, first_adapter())
    while not local.done:
        local.step()
    assert done.aggregator.version(1) == to_bytes(local.adapter)


def test_everyone_learns_that_the_job_is_over(tmp_path):
    done = world(tmp_path, evaluate=True).run()
    done.turn()
    assert {d.agent.finished for d in done.devices} == {"3 rounds are done"}
    assert all(d.kinds()[-1] == "finished" for d in done.devices)


def test_evaluation_fills_the_rows(tmp_path):
    done = world(tmp_path, evaluate=True).run()
    rows = done.aggregator.ledger.rows()
    assert [row.round for row in rows] == [0, 1, 2, 3]
    assert [row.devices for row in rows] == [0, 4, 4, 4]
    assert rows[3].loss < rows[0].loss
    expected = workbench_of(9).evaluate(None, first_adapter())
    assert (rows[0].loss, rows[0].accuracy) == (expected.loss, expected.accuracy)
    assert done.aggregator.rows == rows, "each row is told once, in order, and complete"


def test_bytes_are_counted_on_both_sides(tmp_path):
    done = world(tmp_path, numbers=(0, 1)).run()
    rows = done.aggregator.ledger.rows()
    update_bytes = len(encode_update("fp32", {n: first_adapter()[n] for n in ("w", "b")}, first_adapter()))
    adapter_bytes = len(done.aggregator.version(0))
    assert [row.bytes_up for row in rows] == [0, *[2 * update_bytes] * 3], "never_trained does not travel"
    assert [row.bytes_down for row in rows] == [0, 0, 2 * adapter_bytes, 2 * adapter_bytes], (
        "version 0 is at hand"
    )
    cost = done.aggregator.ledger.cost()
    assert cost.bytes_up == 6 * update_bytes
    assert cost.bytes_received > cost.bytes_up
    assert cost.bytes_sent > cost.bytes_down


@pytest.mark.parametrize("codec", ["fp16", "int8"])
def test_a_lossy_codec_comes_close_and_feeds_back(tmp_path, codec):
    done = world(tmp_path, numbers=(0, 1), codec=codec).run()
    exact = in_process((0, 1), rounds=3, settings=settings_of())
    found, wanted = load(done.aggregator.version(3)), load(exact)
    np.testing.assert_allclose(found["w"], wanted["w"], atol=1e-4)
    assert found["w"].tobytes() != wanted["w"].tobytes()
    assert list((done.devices[0].folder).glob("residual-*")), "what was not conveyed is kept"


def test_lost_doubled_and_damaged_messages_change_nothing(tmp_path):
    rng = np.random.default_rng(3)

    def disturb(topic, payload):
        if topic.endswith("status"):
            return (payload,)
        fate = rng.integers(12)
        damaged = payload[:-1] + bytes([payload[-1] ^ 1])
        return {0: (), 1: (payload, payload), 2: (damaged,)}.get(int(fate), (payload,))

    done = world(tmp_path, disturb=disturb).run(turns=20_000)
    assert done.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


@pytest.mark.parametrize("turns", [3, 8, 14])
def test_a_killed_aggregator_goes_on_where_it_was(tmp_path, turns):
    running = world(tmp_path, evaluate=True, strategy="fedavgm")
    for _ in range(turns):
        running.turn()
    running.aggregator.kill()
    for _ in range(4):
        running.turn()
    running.aggregator.start(running.now)
    running.run()
    expected = in_process(FOUR, rounds=3, settings=settings_of(strategy="fedavgm"))
    assert running.aggregator.version(3) == expected
    assert [row.devices for row in running.aggregator.ledger.rows()] == [0, 4, 4, 4]


def test_an_update_acknowledged_before_the_kill_is_neither_lost_nor_trained_again(tmp_path):
    running = world(tmp_path, numbers=(0, 1), rounds=1)
    slow = running.devices[1]
    running.run(until=lambda: "offer" in slow.kinds())
    slow.kill()
    running.run(until=lambda: "accepted" in running.devices[0].kinds())
    running.aggregator.kill()
    running.aggregator.start(running.now)
    slow.start()
    running.run()
    assert running.devices[0].kinds().count("trained") == 1
    assert running.aggregator.version(1) == in_process((0, 1), rounds=1, settings=settings_of())


@pytest.mark.parametrize("turns", [2, 5, 8])
def test_a_killed_device_resumes(tmp_path, turns):
    running = world(tmp_path)
    for _ in range(turns):
        running.turn()
    running.devices[2].kill()
    for _ in range(3):
        running.turn()
    running.devices[2].start()
    running.run()
    assert running.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


def test_a_device_that_stays_away_is_left_behind_at_the_deadline(tmp_path):
    running = world(tmp_path, min_clients=3, rounds=2, patience=Patience(deadline_s=30))
    running.run(until=lambda: running.devices[3].kinds() == ["offer"])
    running.devices[3].kill()
    running.run()
    drop = {(1, 3), (2, 3)}
    assert running.aggregator.version(2) == in_process(FOUR, rounds=2, settings=settings_of(), drop=drop)


def test_a_restarted_server_brings_everyone_back(tmp_path):
    running = world(tmp_path)
    for _ in range(12):
        running.turn()
        if running.now % 2 == 0:
            running.server.restart()
    running.run()
    assert running.aggregator.version(3) == in_process(FOUR, rounds=3, settings=settings_of())


class Stranger:
    """Speaks to a service by hand."""

    def __init__(self, tmp_path, name="device-0", **changes):
        self.server = Loopback()
        changes = {"clients": 1, "min_clients": 1, "rounds": 1, **changes}
        self.aggregator = Aggregator(self.server, tmp_path, **changes).start()
        self.name = name
        self.link = self.server.connect([device_topic(JOB, name, "down"), aggregator_topic(JOB)])
        self.now = 1.0

    def say(self, message, *, name=None):
        self.say_raw(encode(message), name=name)

    def say_raw(self, payload, *, name=None):
        self.link.publish(device_topic(JOB, name or self.name, "up"), payload)
        self.aggregator.poll(self.now)

    def heard(self, kind):
        messages = []
        while (found := self.link.receive(0)) is not None:
            messages.append(decode(found[1]))
        return [m for m in messages if isinstance(m, kind)]

    def hello(self, **changes):
        self.say(Hello(**{"device_id": self.name, "artifact": ARTIFACT, "num_samples": 5, **changes}))

    def ready(self, payload, **changes):
        manifest = Outgoing(payload).manifest
        fields = {"device_id": self.name, "job": JOB, "round": 1, "version": 0, "codec": "fp32"}
        return UpdateReady(**{**fields, "num_samples": 5, "payload": manifest, **changes})

    def deliver(self, payload, **changes):
        """Announce, serve every request for this payload (garbled announcements cause others), and return the verdicts."""
        self.say(self.ready(payload, **changes))
        outgoing, verdicts = Outgoing(payload), []
        while found := self.heard((Request, Verdict)):
            verdicts += [m for m in found if isinstance(m, Verdict)]
            ours = outgoing.manifest.sha256
            for request in [m for m in found if isinstance(m, Request) and m.sha256 == ours]:
                for chunk in outgoing.chunks(request):
                    self.say(chunk)
        return verdicts


def good_payload():
    adapter = first_adapter()
    return encode_update("fp32", {n: v + np.float32(1) for n, v in adapter.items()}, adapter)


def test_a_good_update_is_durable_before_it_is_acknowledged(tmp_path):
    stranger = Stranger(tmp_path, clients=2, min_clients=1)
    other = Hello(device_id="other", artifact=ARTIFACT, num_samples=5)
    stranger.hello()
    stranger.say(other, name="other")
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True]
    stranger.aggregator.kill()
    again = stranger.aggregator.start(2.0)
    assert again.ledger.past().accepted.keys() == {(1, "device-0")}
    assert [v.accepted for v in stranger.deliver(good_payload())] == [True], "the same update again"
    assert len(list(again.ledger.accepted(1))) == 1


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
        (good_payload(), {"num_samples": 2**40}, "samples"),
        (good_payload(), {"codec": "int8"}, "its codec is 'int8'"),
        (good_payload(), {"version": 3}, "it starts from version 3"),
        (good_payload(), {"round": 2}, "round 2 is unknown"),
        (good_payload(), {"round": -1}, "round -1 is unknown"),
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


def hot_one(done, number):
    """Give a device a gate and a dial of its temperature, which says hot."""
    dial = [90.0]
    rules = Rules(temperature=Temperature(max_c=70), period_s=0, resume_after_s=0)
    done.devices[number].agent._gate = Gate(rules, lambda: Reading(temperature=dial[0]))
    return dial


def test_a_device_that_resumes_before_the_deadline_loses_nothing(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        paused = world(tmp_path, numbers=(0, 1), rounds=2, patience=Patience(deadline_s=600))
        dial = hot_one(paused, 1)
        paused.run(until=lambda: paused.now > 500)
    assert "device device-1 pauses: temperature 90.0 C is above 70 C" in caplog.text
    assert paused.aggregator.service.federation.version == 0
    dial[0] = 50.0
    paused.run()
    expected = in_process((0, 1), rounds=2, settings=paused.aggregator.settings)
    assert paused.aggregator.version(2) == expected


def test_a_round_closes_without_a_device_that_stays_paused_and_the_next_has_it_again(tmp_path):
    paused = world(tmp_path, numbers=(0, 1), rounds=2, min_clients=1, patience=Patience(deadline_s=100))
    dial = hot_one(paused, 1)
    service = paused.aggregator.service
    paused.run(until=lambda: service.federation.version == 1)
    paused.run(until=lambda: "offer" in paused.devices[1].kinds()[2:])
    dial[0] = 50.0
    paused.run()
    expected = in_process((0, 1), rounds=2, settings=paused.aggregator.settings, drop={(1, 1)})
    assert paused.aggregator.version(2) == expected


def test_a_pause_over_extensions_is_waited_for(tmp_path):
    paused = world(tmp_path, numbers=(0, 1), rounds=1, patience=Patience(deadline_s=60))
    dial = hot_one(paused, 1)
    paused.run(until=lambda: paused.now > 400)
    assert "declined" not in paused.devices[1].kinds()
    dial[0] = 50.0
    paused.run()
    expected = in_process((0, 1), rounds=1, settings=paused.aggregator.settings)
    assert paused.aggregator.version(1) == expected
