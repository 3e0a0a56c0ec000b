"""A device in JavaScript that pins a key: what Python's signer says is taken, and what strangers and recorders say is not."""

import json
import time

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from fleet import JOB
from golden_wire import filled
from node_web import needs_web, run
from processes import Processes
from signed import KEY, NEXT_KEY, STRANGERS
from web_federation import TIMEOUT_S, NodeDevice, federation, furthest, websocket_server
from words import write_lines

from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Finished,
    Offer,
    Verdict,
    aggregator_topic,
    device_topic,
    encode,
)
from fleetune.device_runtime.network.signing import Signer, key_id_of

pytestmark = needs_web
DEVICE = "device-1"
DOWN, STATUS = device_topic(JOB, DEVICE, "down"), aggregator_topic(JOB)


def pem(key):
    return key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()


def offer(round_number, version):
    message = filled(Offer)
    fields = {"job": JOB, "round": round_number, "version": version, "role": "train"}
    return type(message)(**{name: getattr(message, name) for name in message.__struct_fields__} | fields)


def status(session="one", **changes):
    fields = {"job": JOB, "session": session, "online": True, "round": 1, "version": 0, **changes}
    return AggregatorStatus(**fields)


class Script:
    """Messages in their order, and what is to become of each."""

    def __init__(self):
        self.steps, self.expected, self._now = [], [], 0.0

    def say(self, payload, *, topic=DOWN, taken="", told="", **more):
        self._now += 61.0  # a line a minute for each kind
        self.steps.append({"topic": topic, "hex": payload.hex(), "now": self._now})
        self.expected.append({"taken": taken, "told": told, "late": "", "declined": "", **more})


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """A job in three starts of its aggregator, a stranger in between, and a device that is started anew."""
    script, first = Script(), Signer(KEY, start=1)
    one, two = (first.seal(DOWN, encode(offer(n, n - 1))) for n in (1, 2))
    key, other = (key_id_of(k.public_key()).hex() for k in (KEY, STRANGERS))
    script.say(first.seal(STATUS, encode(status())), topic=STATUS, taken="aggregator_status")
    script.say(one, taken="offer")
    script.say(encode(filled(Chunk)), taken="chunk")
    script.say(encode(filled(Chunk)), topic=STATUS, told="chunk is not signed")
    script.say(encode(offer(2, 1)), told="offer is not signed")
    script.say(encode(status(finished=True)), topic=STATUS, told="aggregator_status is not signed")
    script.say(encode(AggregatorStatus(job=JOB, session="", online=False, round=0, version=0)), topic=STATUS)
    script.say(
        Signer(STRANGERS, start=9).seal(DOWN, encode(Finished(job=JOB))), told=f"key {other} signed it"
    )
    script.say(two[:-1] + bytes([two[-1] ^ 1]), told=f"key {key} did not sign this for this topic")
    script.say(two[:40] + bytes([two[40] ^ 1]) + two[41:], told=f"key {key} did not sign this for this topic")
    moved = first.seal(device_topic(JOB, "device-4", "down"), encode(Finished(job=JOB)))
    script.say(moved, told=f"key {key} did not sign this for this topic")
    script.say(two, taken="offer")
    script.say(
        one,
        told="message 0 of the aggregator's start 1 is older than message 1 of start 1",
        declined="round 1 from version 0 is older",
    )
    script.say(two, taken="offer")
    script.steps.append({"restart": True})
    script.say(
        one, told="message 0 of the aggregator's start 1 is older", declined="round 1 from version 0 is older"
    )
    second = Signer(NEXT_KEY, start=2)
    script.say(
        second.seal(DOWN, encode(offer(3, 0))),
        taken="offer",
        late="round 3 from version 0 is older than what",
    )
    script.say(
        second.seal(DOWN, encode(offer(1, 1))),
        taken="offer",
        late="a job that begins anew needs another name",
    )
    script.say(
        first.seal(STATUS, encode(status())), topic=STATUS, told="of the aggregator's start 1 is older than"
    )
    script.say(second.seal(DOWN, encode(Verdict(job=JOB, round=2, accepted=True))), taken="verdict")
    end = second.seal(DOWN, encode(Finished(job=JOB)))
    script.say(end, taken="finished")
    script.steps += [{"close": True}, {"restart": True}]
    script.say(end, told="it was recorded and said again")
    script.say(Signer(KEY, start=3).seal(DOWN, encode(offer(4, 3))), taken="offer")
    script.say(second.seal(DOWN, encode(offer(4, 3)))[:-1] + b"x", told="did not sign this")
    private = KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    pems = [
        private,
        pem(generate_private_key(SECP256R1())),
        "no key",
        pem(KEY).replace("MCow", "M*ow"),
        pem(KEY),
    ]
    cases = {"trust": pem(KEY) + pem(NEXT_KEY), "job": JOB, "device": DEVICE, "role": "train"}
    path = tmp_path_factory.mktemp("signed") / "cases.json"
    path.write_text(json.dumps(cases | {"steps": script.steps, "pems": pems}))
    return run("guard.mjs", path), script.expected


def test_only_what_a_pinned_key_signed_is_taken_and_nothing_twice(played):
    found, expected = played
    assert len(found["rows"]) == len(expected)
    for number, (row, wanted) in enumerate(zip(found["rows"], expected, strict=True)):
        assert row["taken"] == wanted["taken"], (number, row)
        for field in ("told", "late", "declined"):
            assert wanted[field] in row[field], (number, row)
            assert bool(wanted[field]) == bool(row[field]), (number, row)


def test_what_is_no_public_key_is_one_sentence(played):
    wanted = ["a private key", "another sort", "no public key in PEM", "damaged", ""]
    for said, part in zip(played[0]["refused"], wanted, strict=True):
        assert part in said
        assert bool(said) == bool(part)
        assert said.startswith("ConfigError: ") or not part


def test_a_browser_without_ed25519_is_told_what_to_do(played):
    assert "https or on localhost" in played[0]["without"]


@pytest.mark.slow
def test_a_signed_job_is_done_and_an_unsigned_one_is_not(signed_artifact, word_artifact, tmp_path):
    expected, _ = federation(tmp_path / "python", signed_artifact, {}, node=None)
    key = {"sign_key": str(tmp_path / "key")}
    public = tmp_path / "key.pub"
    found, device = federation(tmp_path / "node", signed_artifact, key, node={}, trust=public)
    assert furthest(found, expected) < 1e-6
    assert device.kinds().count("accepted") == 3
    assert "untrusted" not in device.kinds()
    for artifact, said in ((signed_artifact, "is not signed"), (word_artifact, "nobody did")):
        assert said in _refused(tmp_path / said[:2], artifact, public)


def _refused(folder, artifact, trust):
    """What a device that pins a key says of an aggregator without one, or of an artifact that nobody signed."""
    folder.mkdir()
    server, ws = websocket_server(folder)
    processes = Processes(folder, artifact, hello_s=2.0)
    with server:
        job = {"clients": 1, "min_clients": 1, "rounds": 1, "gather_s": 60, "out": str(folder / "run")}
        processes.start("aggregator", "aggregate", {"mqtt": server.url, "job": "words", **job})
        given = {"artifact": artifact, "data": write_lines(folder / "b.csv"), "url": ws, "job": "words"}
        device = NodeDevice(folder, **given, id="b", helloS=2, trust=trust).start()
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while not {"untrusted", "failed"} & set(device.kinds()):
                assert time.monotonic() < deadline, device.log.read_text()
                time.sleep(0.02)
        finally:
            processes.close()
            device.kill()
    assert "offer" not in device.kinds()
    return next(e["text"] for e in device.events if e["kind"] in ("untrusted", "failed"))
