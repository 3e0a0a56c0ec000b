"""The JavaScript wire against the committed fixtures and Python's codecs, to the byte."""

import hashlib
import json

import numpy as np
import pytest
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from golden_wire import FOLDER
from node_web import needs_web, run
from safetensors.numpy import load
from signed import KEY

from fleetune.broker.authority.certificates import self_signed
from fleetune.device_runtime.agent.lazy_upload import spared
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts import wire
from fleetune.device_runtime.contracts.codecs import chain_named, make_codec, pack, unpack, with_feedback
from fleetune.device_runtime.contracts.codecs.frame import read
from fleetune.device_runtime.contracts.pull import Pull
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.keys import new_key
from fleetune.device_runtime.network.signing import Signer

pytestmark = needs_web
RECORDED = json.loads((FOLDER / "messages.json").read_text())
DIALOGUE = json.loads((FOLDER / "dialogue.json").read_text())
CODECS = [
    ("fp32", 0.0, 0), ("fp16", 0.0, 0), ("int8", 0.0, 0), ("xor", 0.0, 0),
    *(("quant", 0.0, bits) for bits in (0, 1, 2, 3, 4, 8, 16)),
    *(("topk", 0.1, bits) for bits in (0, 4, 8, 16)), ("topk", 0.9, 0), ("topk", 0.9, 8),
    *(("innovation", 0.0, bits) for bits in (0, 1, 3, 8, 16)),
    *((name, 0.2, bits) for name in ("caesar", "caesar-sign", "caesar-zero") for bits in (0, 16)),
]  # fmt: skip
DEFLATED = {"xor", "quant", "topk", "innovation", "caesar", "caesar-sign", "caesar-zero"}
"""Codecs whose bytes another deflate may pack otherwise; what is in them is compared."""
LENGTHS = [0, 1, 55, 56, 63, 64, 65, 119, 120, 1000]


def _tensors(seed):
    """Names of layers and of a head, of sizes that fill no block; an adapter and what training made of it."""
    rng = np.random.default_rng(seed)
    shapes = {
        "m.layer.0.a": (3, 50),
        "m.layer.0.b": (50, 3),
        "m.layer.10.a": (700,),
        "head.weight": (5, 31),
        "head.bias": (5,),
    }
    held = {name: rng.normal(size=shape).astype("f4") for name, shape in shapes.items()}
    moved = {
        n: (v + rng.normal(scale=1e-2, size=v.shape) * (rng.random(v.shape) < 0.7)).astype("f4")
        for n, v in held.items()
    }
    return held, {name: moved[name] for name in list(shapes)[: 3 + seed % 3]}


def _edges():
    """Messages whose numbers and texts lie where MessagePack takes a byte more."""
    counts = [0, 127, 128, 255, 256, 2**16 - 1, 2**16, 2**31 - 1]
    yield from (
        wire.Verdict(job="job", round=count, accepted=True, reason="r" * (count % 500)) for count in counts
    )
    yield from (wire.Chunk(sha256="a", index=0, data=b"d" * size) for size in (0, 255, 256, 2**16 - 1, 2**16))
    work = LocalWork(seed=2**53 - 1, steps=2**33)
    manifest = wire.TransferManifest(size_bytes=2**32, chunk_bytes=1, chunk_digests=b"", sha256="a" * 64)
    yield wire.Offer(job="j", round=1, version=0, role="train", work=work, adapter=manifest, deadline_s=0.0)
    yield wire.Report(
        device_id="d", job="j", round=1, version=0, loss=float("inf"), accuracy=-0.0, num_samples=1
    )


def _payload(codec, ratio, bits, seed):
    held, moved = _tensors(seed)
    made = make_codec(codec, ratio, bits)
    given = {
        "codec": codec,
        "ratio": ratio,
        "bits": bits,
        "values": to_bytes(moved).hex(),
        "reference": to_bytes(held).hex(),
    }
    return given | {"payload": pack(made, moved, held).payload.hex()}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """What Node makes of all cases, in one process, and the cases."""
    messages = [{"hex": row["bytes"]} for row in (*RECORDED.values(), *DIALOGUE)]
    messages += [{"hex": wire.encode(message).hex()} for message in _edges()]
    payloads = [_payload(*codec, seed) for codec in CODECS for seed in (0, 1, 2)]
    damaged = [
        {**p, "payload": (bytes.fromhex(p["payload"])[:-3] if cut else _flipped(p["payload"])).hex()}
        for p in payloads[::3]
        for cut in (True, False)
    ]
    cases = {
        "messages": messages,
        "payloads": payloads,
        "damaged": damaged,
        "dialogue": DIALOGUE,
        "sequences": [_sequence(bits) for bits in (0, 1, 5, 16)],
        "pulls": [_lossy(seed) for seed in range(8)],
        "shas": [(b"ab" * size)[:size].hex() for size in LENGTHS],
        "files": [p["values"] for p in payloads[:3]],
        "refused": [text for text, _ in REFUSED],
    }
    path = tmp_path_factory.mktemp("wire") / "cases.json"
    path.write_text(json.dumps(cases))
    return run("wire.mjs", path), cases


def _sequence(bits):
    """Updates of a device that remembers: ever other tensors, magnitudes that are all equal, and an innovation that is small."""
    rounds = []
    for seed in (0, 1, 2, 2, 3):
        held, moved = _tensors(seed)
        if seed == 1:
            moved["m.layer.0.a"] = held["m.layer.0.a"] + np.float32(0.25)
            moved["m.layer.0.b"] = held["m.layer.0.b"]
        bound = 1e6 if rounds and seed == 2 else 0.0
        rounds.append({"values": to_bytes(moved).hex(), "reference": to_bytes(held).hex(), "bound": bound})
    return {"codec": "innovation", "bits": bits, "rounds": rounds}


def _remembering(given):
    """What Python makes of a sequence: each payload, and the memory after it."""
    codec, memory = make_codec("innovation", 0.0, given["bits"]), {}
    for row in given["rounds"]:
        values, held = (load(bytes.fromhex(row[name])) for name in ("values", "reference"))
        packed = pack(with_feedback(codec), values, held, memory=memory)
        instead = row["bound"] and spared(
            packed, codec, held, memory=memory, bound=row["bound"], reference_sha256=""
        )
        packed = instead or packed
        yield packed, held, bool(instead)
        memory = packed.memory


def _lossy(seed):
    """A transfer over a link that loses chunks, breaks and stalls: what happens, and when."""
    rng = np.random.default_rng(seed)
    content = rng.bytes(40 * 1000 + 7)
    outgoing, now, events = Outgoing(content, chunk_bytes=1000), 0.0, []
    pull = Pull(outgoing.manifest, size_bytes_max=10**9, now=0.0)
    while not pull.done:
        now += float(rng.choice([0.1, 0.5, 11.0, 30.0]))
        events.append(["due", now])
        request = pull.due(now)
        for chunk in outgoing.chunks(request) if request else ():
            if rng.random() < 0.6:
                now += 0.05
                events.append(["add", now, chunk.index])
                pull.add(chunk, now)
        if rng.random() < 0.1:
            events.append(["restart", now])
            pull.restart(now)
    return {"content": content.hex(), "chunkBytes": 1000, "events": events}


def _pulled(given):
    outgoing = Outgoing(bytes.fromhex(given["content"]), chunk_bytes=given["chunkBytes"])
    pull, all_of_them = Pull(outgoing.manifest, size_bytes_max=10**9, now=0.0), range(41)
    data = {i: bytes.fromhex(given["content"])[1000 * i : 1000 * (i + 1)] for i in all_of_them}
    for kind, now, *index in given["events"]:
        request = pull.due(now) if kind == "due" else None
        if kind == "restart":
            pull.restart(now)
        if kind == "add":
            pull.add(wire.Chunk(sha256=pull.sha256, index=index[0], data=data[index[0]]), now)
        yield [request and request.missing.hex(), pull.waits_until]


def _flipped(payload):
    """With a byte in the middle of a length or name changed."""
    content = bytearray(bytes.fromhex(payload))
    content[3] ^= 0xFF
    return bytes(content)


def _changed(tag, field, value):
    fields = {"type": tag} | {
        n: bytes.fromhex(v["hex"]) if isinstance(v, dict) and "hex" in v else v
        for n, v in RECORDED[tag]["fields"].items()
    }
    import msgspec

    return msgspec.msgpack.encode(fields | {field: value}).hex()


REFUSED = [
    (RECORDED["verdict"]["bytes"][:-2], "malformed"),
    (RECORDED["verdict"]["bytes"] + "00", "malformed"),
    ("c1", "malformed"),
    ("00" * (128 * 1024 + 1), "at most 131072"),
    (_changed("verdict", "v", 2), "protocol version 2"),
    (_changed("verdict", "round", -1), "round: expected an integer"),
    (_changed("verdict", "job", "j" * 65), "job: expected at most 64"),
    (_changed("verdict", "job", "j\x00"), "job: expected at most 64"),
    (_changed("verdict", "type", "strange"), "no type strange"),
    (_changed("chunk", "data", bytes(120 * 1024 + 1)), "data: expected at most 122880 bytes"),
    ("91" * 40 + "c0", "malformed"),
]


def test_every_message_is_read_and_written_to_the_byte(made):
    found, cases = made
    assert [row["hex"] for row in found["messages"]] == [row["hex"] for row in cases["messages"]]
    for row, (tag, wanted) in zip(found["messages"], RECORDED.items(), strict=False):
        assert row["fields"] == {"type": tag} | wanted["fields"]


@pytest.mark.parametrize("case", range(len(CODECS)), ids=["-".join(map(str, c)) for c in CODECS])
def test_every_codec_packs_and_unpacks_as_python(case, made):
    found, cases = made
    for i in range(3 * case, 3 * case + 3):
        given, row = cases["payloads"][i], found["payloads"][i]
        codec = make_codec(given["codec"], given["ratio"], given["bits"])
        held = load(bytes.fromhex(given["reference"]))
        wanted = unpack(codec, bytes.fromhex(given["payload"]), held).values
        assert row["sameContent"]
        assert row["sameDecoded"]
        assert row["sameConveyed"]
        assert row["sameBytes"] or given["codec"] in DEFLATED
        ours = unpack(codec, bytes.fromhex(row["payload"]), held).values
        here = load(bytes.fromhex(row["decoded"]))
        assert here.keys() == wanted.keys() == ours.keys()
        for name, value in wanted.items():
            assert np.array_equal(here[name], value)
            assert np.array_equal(ours[name], value)


@pytest.mark.parametrize("case", range(4), ids=["adaptive", "1 bit", "5 bits", "16 bits"])
def test_innovation_remembers_as_python_does(case, made):
    """Payloads one after another, what is owed and what both sides know: to the bit, repeats included."""
    found, cases = made
    theirs, repeats = {}, 0
    for row, (packed, held, is_repeat) in zip(
        found["sequences"][case], _remembering(cases["sequences"][case]), strict=True
    ):
        ours = bytes.fromhex(row["payload"])
        assert inflated(ours) == inflated(packed.payload)
        assert chain_named(ours) == chain_named(packed.payload)
        here = load(bytes.fromhex(row["memory"]))
        assert here.keys() == packed.memory.keys()
        assert all(np.array_equal(here[name], value) for name, value in packed.memory.items())
        decoded = unpack(
            make_codec("innovation", 0.0, cases["sequences"][case]["bits"]), ours, held, memory=theirs
        )
        theirs, repeats = decoded.memory, repeats + is_repeat
        there = load(bytes.fromhex(row["decoded"]))
        assert all(np.array_equal(there[name], value) for name, value in decoded.values.items())
        assert row["isConveyed"]
    assert repeats


def inflated(payload):
    """Parts of a frame, inflated: two deflates may differ in bytes."""
    frame, _ = read(payload, bytes_max=10**7)
    return frame._replace(parts={kind: bytes(part) for kind, part in frame.parts.items()})


def test_a_device_says_what_the_recorded_one_says(made):
    """Requests after a lost chunk, the update's manifest, and the chunks that are asked for."""
    found, _ = made
    said = [line["bytes"] for line in DIALOGUE if line["from"] == "device" and line["type"] != "hello"]
    assert found["dialogue"]["said"] == said


def test_a_receiver_refuses_chunks_and_manifests_that_cannot_be(made):
    found, _ = made
    wanted = [
        "digest differs",
        "chunk 99 of",
        "499 bytes",
        "expected 0 to 10",
        "64 hexadecimal",
        "chunks of 0 bytes",
        "are missing",
    ]
    for said, part in zip(found["dialogue"]["refused"], wanted, strict=True):
        assert said.startswith("WireError: ")
        assert part in said


def test_a_pull_asks_as_pythons_does_under_loss(made):
    """The same chunks at the same times, whatever was lost, and the same patience."""
    found, cases = made
    for given, said in zip(cases["pulls"], found["pulls"], strict=True):
        assert any(row[0] for row in said)
        for got, wanted in zip(said, _pulled(given), strict=True):
            assert got[0] == wanted[0]
            assert got[1] == pytest.approx(wanted[1])


def test_damaged_payloads_are_refused(made):
    found, _ = made
    assert set(found["damaged"]) == {"WireError"}


@pytest.mark.parametrize("case", range(len(REFUSED)))
def test_bad_messages_are_refused_in_one_sentence(case, made):
    found, _ = made
    assert found["refused"][case].startswith("WireError: ")
    assert REFUSED[case][1] in found["refused"][case]


def test_digests_and_files_are_those_of_python(made):
    found, cases = made
    assert found["shas"] == [hashlib.sha256(bytes.fromhex(text)).hexdigest() for text in cases["shas"]]
    assert found["files"] == cases["files"]


def test_no_damage_to_what_is_read_throws_anything_but_one_sentence(word_artifact, tmp_path):
    """Bytes changed, cut out and doubled, for every reader of messages, payloads and files."""
    coded = {f"{codec} {bits}": _payload(codec, ratio, bits, 0) for codec, ratio, bits in CODECS}
    certificate = self_signed("home", new_key(), days=9)
    samples = {name: [given["payload"]] for name, given in coded.items()} | {
        "message": [row["bytes"] for row in RECORDED.values()],
        "sealed": [Signer(KEY, start=1).seal("topic", bytes.fromhex(RECORDED["verdict"]["bytes"])).hex()],
        "keys": [KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).hex()],
        "certificate": [certificate.public_bytes(Encoding.DER).hex()],
        "authorities": [certificate.public_bytes(Encoding.PEM).hex()],
        "tensors": [(word_artifact / "adapter.safetensors").read_bytes().hex()],
        "manifest": [json.dumps(json.loads((word_artifact / "manifest.json").read_text())).encode().hex()],
        "lines": [b'text,label\n"a, b",c\n'.hex(), b'{"text": "a", "label": 1}\n'.hex()],
    }
    codecs = [
        {"name": name, **{k: given[k] for k in ("ratio", "bits", "reference")}}
        for name, given in coded.items()
    ]
    path = tmp_path / "cases.json"
    path.write_text(json.dumps({"seed": 7, "tries": 300, "samples": samples, "codecs": codecs}))
    found = run("fuzz.mjs", path)
    assert {name: row["strange"] for name, row in found.items() if row["strange"]} == {}
    assert all(row["refused"] for row in found.values())
