"""Sums under masks in JavaScript: keys, seals, streams, shares and masked numbers are Python's, byte for byte."""

import json
import signal
import subprocess
import time

import numpy as np
import pytest
from enrolled import authority_of
from node_web import NODE, WEB, needs_web, run
from processes import Processes
from safetensors.numpy import save
from web_federation import JOB, TIMEOUT_S, NodeDevice, federation, furthest, own_options, websocket_server
from words import write_lines

from fleetune.device_runtime.contracts.mask_messages import MaskPeer
from fleetune.device_runtime.contracts.secure_sums import keys
from fleetune.device_runtime.contracts.secure_sums.grid import placed, write_numbers
from fleetune.device_runtime.contracts.secure_sums.masking import Masker, mask
from fleetune.device_runtime.contracts.secure_sums.shares import combine
from fleetune.device_runtime.contracts.work import LocalWork, SumGrid
from fleetune.device_runtime.terms.judging import objections
from fleetune.device_runtime.terms.terms import Terms

pytestmark = needs_web
SCOPE = keys.Scope("words", "1-0")
SECRET, OTHER, THIRD = bytes(range(32)), bytes(range(1, 33)), bytes(range(2, 34))
SEED, TEXT = bytes(range(3, 35)), bytes(range(66))
GRIDS = [
    SumGrid(bits=16, weight_bits=10, summands=3, limit=0.01),
    SumGrid(bits=24, weight_bits=20, summands=100_000, limit=0.5),
    SumGrid(bits=3, weight_bits=0, summands=2, limit=0.02),
]


def update():
    """Tensors that need more than one draw of 65,536, some changes beyond any range."""
    rng = np.random.default_rng(4)
    held = {
        "b.10": rng.normal(size=(300, 211)).astype("f4"),
        "b.9": rng.normal(size=7000).astype("f4"),
        "head": rng.normal(size=5).astype("f4"),
    }
    moved = {n: (v + rng.normal(scale=4e-3, size=v.shape)).astype("f4") for n, v in held.items()}
    return {"b.10": moved["b.10"], "b.9": moved["b.9"]}, held


@pytest.mark.parametrize("grid", GRIDS, ids=["usual", "widest", "narrow"])
def test_every_part_is_that_of_python(grid, tmp_path):
    values, held = update()
    peers = [
        MaskPeer(place=place, device_id=name, mask_key=keys.public_of(key), share_key=bytes(32))
        for place, name, key in ((0, "pi", OTHER), (2, "zoe", THIRD))
    ]
    numbers, num_cut = placed(values, held, grid, weight=5, seed=9)
    plain = write_numbers(numbers, grid)
    mask(numbers, Masker(SCOPE, "page", 1, SECRET, SEED), peers, grid)
    public, way = keys.public_of(OTHER), {"sender": "pi", "receiver": "page"}
    case = {
        "secret": SECRET.hex(), "seed": SEED.hex(), "public": public.hex(), "names": ["page", "pi"],
        "scope": {"job": SCOPE.job, "group": SCOPE.group}, "text": TEXT.hex(), "holders": [3, 1, 2, 9], "threshold": 3,
        "sealed": keys.seal(TEXT, OTHER, keys.public_of(SECRET), SCOPE, **way).hex(),
        "grid": {"bits": grid.bits, "weight_bits": grid.weight_bits, "summands": grid.summands, "limit": grid.limit},
        "values": save(values).hex(), "reference": save(held).hex(), "weight": 5, "drawn": 9, "place": 1,
        "peers": [{"place": p.place, "device_id": p.device_id, "mask_key": p.mask_key.hex()} for p in peers],
    }  # fmt: skip
    (tmp_path / "case.json").write_text(json.dumps(case))
    found = run("sums.mjs", tmp_path / "case.json")
    assert found["public"] == keys.public_of(SECRET).hex()
    assert found["digest"] == keys.digest_of_seed(SEED).hex()
    assert found["pair"] == keys.pair_stream(OTHER, keys.public_of(SECRET), SCOPE, ("pi", "page"))(200).hex()
    assert found["own"] == keys.own_stream(SEED, SCOPE, "page")(200).hex()
    assert found["sealed"] == keys.seal(TEXT, SECRET, public, SCOPE, sender="page", receiver="pi").hex()
    assert found["opened"] == TEXT.hex()
    assert (found["numCut"], found["plain"]) == (num_cut, plain.hex())
    assert found["masked"] == write_numbers(numbers, grid).hex()
    shares = {holder: bytes.fromhex(share) for holder, share in found["shares"]}
    assert combine({holder: shares[holder] for holder in (1, 3, 9)}, 3) == SECRET
    assert combine({holder: shares[holder] for holder in (1, 2, 3)}, 3) == SECRET
    assert all(said.startswith("WireError: ") for said in found["refused"]), found["refused"]


DECLINES = """
import { pathToFileURL } from "node:url";
const at = (name) => pathToFileURL(`${process.argv[1]}/${name}`);
const { checkTerms, PLAIN_TERMS } = await import(at("device/terms.mjs"));
const { filledWork } = await import(at("engine/work.mjs")), terms = { ...PLAIN_TERMS, secure_only: true };
const said = ([role, codec]) => {
  try {
    checkTerms(terms, filledWork({ steps: 40, batch_size: 8, codec }), role, 100);
  } catch (error) {
    return `${error.name}: ${error.message}`;
  }
  return "";
};
console.log(JSON.stringify(JSON.parse(process.argv[2]).map(said)));
"""


ASKED = [("train", "fp32"), ("train", "grid"), ("train", "masked"), ("evaluate", "fp32")]


def test_whoever_trains_under_masks_alone_declines_what_python_declines():
    done = subprocess.run(
        [NODE, "--input-type=module", "-e", DECLINES, WEB, json.dumps(ASKED)],
        capture_output=True,
        text=True,
        check=True,
    )
    terms, found = Terms(secure_only=True), json.loads(done.stdout)
    for said, (role, codec) in zip(found, ASKED, strict=True):
        work = LocalWork(steps=40, batch_size=8, codec=codec)
        told = [*objections(terms, work, role=role, num_samples=100, names=["head"])]
        assert said == (
            f"ConfigError: this device's owner does not allow it: {'; '.join(told)}" if told else ""
        )
    assert [bool(said) for said in found] == [True, True, False, False]


THREE = {"clients": 3, "min_clients": 3, "secure": "masks", "secure_range": 0.01, "secure_s": 300.0}
FOUR = {**THREE, "clients": 4, "grace_s": 1.0}


@pytest.fixture(scope="module")
def of_three(word_artifact, tmp_path_factory):
    """The adapter of three Python devices under masks, none of which is lost."""
    return federation(tmp_path_factory.mktemp("three") / "job", word_artifact, THREE, node=None, names="abc")[
        0
    ]


@pytest.mark.slow
@pytest.mark.parametrize("secure", ["masks", "grid"])
def test_a_node_device_sums_with_two_python_devices(secure, of_three, word_artifact, tmp_path):
    """Three rounds; the adapter of three Python devices, within what rounding on the grid may shift."""
    job = {**THREE, "secure": secure}
    found, device = federation(tmp_path / "node", word_artifact, job, node={}, names="abc")
    check_sums(found, device, of_three)


@pytest.mark.slow
def test_a_node_device_in_a_signed_job_sums_and_goes_on_after_a_kill_with_the_same_masks(
    of_three, signed_artifact, tmp_path
):
    """All pin the aggregator's key; the one in Node is killed with its masked update made and not sent, and started again."""
    job = {**THREE, "sign_key": str(tmp_path / "key"), "grace_s": 120.0}
    node, starts = {"state": tmp_path / "b.store", "checkpointEvery": 1}, []

    def disturb(device):
        if device.process.poll() is not None and not starts:
            starts.append(device.process.returncode)
            device.change(leaves=False).start()

    found, device = federation(
        tmp_path / "node", signed_artifact, job, node=node, disturb=disturb, names="abc", leaves="b",
        trust=tmp_path / "key.pub",
    )  # fmt: skip
    assert starts == [-signal.SIGKILL]
    assert "restored" in device.kinds()
    check_sums(found, device, of_three)


@pytest.mark.slow
@pytest.mark.parametrize("leaves", ["b", "c"], ids=["Node's", "a Python device's"])
def test_masks_of_a_device_that_is_lost_after_its_shares_are_taken_off(leaves, word_artifact, tmp_path):
    """The rounds are done without it, and the adapter is that of Python devices of which the same one is lost."""
    given = {"names": "abcd", "leaves": leaves}
    expected, _ = federation(tmp_path / "python", word_artifact, FOUR, node=None, **given)
    found, device = federation(tmp_path / "node", word_artifact, FOUR, node={}, **given)
    for folder in ("python", "node"):
        said = (tmp_path / folder / "aggregator.log").read_text()
        assert "round 1: masked are the updates of a, b, c, d" in said
        assert f"round 1 goes on without {leaves}: gone" in said
        assert "begins anew" not in said
    if leaves == "b":
        assert "trained" not in device.kinds()
        assert furthest(found, expected) < 1e-6
    else:
        check_sums(found, device, expected)


@pytest.mark.slow
def test_where_certificates_vouch_a_node_device_sums_the_same_bits(word_artifact, tmp_path):
    """All demand certificates; the adapter is that of the same devices without, bit for bit."""
    given = {"names": "abc", "enrolls": True}
    expected, _ = federation(tmp_path / "python", word_artifact, THREE, node=None, **given)
    found, device = federation(tmp_path / "node", word_artifact, THREE, node={}, **given)
    check_sums(found, device, expected)
    plain, device = federation(tmp_path / "plain", word_artifact, THREE, node={}, names="abc")
    check_sums(plain, device, expected)
    assert furthest(found, plain) == 0


@pytest.mark.slow
def test_a_node_device_declines_keys_that_the_aggregator_swapped(word_artifact, tmp_path):
    """By name and reason, and nothing of its update leaves."""
    device = swapped(tmp_path / "job", word_artifact)
    declined = next(event["text"] for event in device.events if event["kind"] == "declined")
    assert "the keys told of " in declined
    assert "a: its certificate's key did not sign its keys for this group" in declined
    assert not {"trained", "sent", "accepted"}.intersection(device.kinds())


def swapped(folder, artifact):
    """A device in Node, once it has declined the round of an aggregator that swaps its neighbours' keys."""
    folder.mkdir()
    authority, pairs = authority_of(folder / "trust", "abc")
    server, ws = websocket_server(folder, authority.parent)
    processes, common = Processes(folder, artifact, hello_s=2.0), {"job": "words", "timeout_s": 120}
    data = {name: write_lines(folder / f"{name}.csv", seed=seed) for seed, name in enumerate("abc")}
    with server:
        common |= {"mqtt": server.url, "ca_file": str(authority)}
        job = common | {"out": str(folder / "run"), **JOB, **THREE}
        processes.start("aggregator", "aggregate", job, module="swapping")
        for name in "ac":
            own = own_options(folder, name, data[name])
            own |= pairs[name]._asdict()
            processes.start(name, "device", common | own)
        given = {"artifact": artifact, "data": data["b"], "url": ws, "job": "words", "id": "b", "helloS": 2}
        given |= {
            "certificate": pairs["b"].cert,
            "key": pairs["b"].key,
            "maskAuthority": authority,
            "terms": {"least_effective": 0},
        }
        device = NodeDevice(folder, **given).start()
        try:
            deadline = time.monotonic() + TIMEOUT_S
            while "declined" not in device.kinds():
                assert time.monotonic() < deadline, device.log.read_text()
                time.sleep(0.02)
        finally:
            processes.close()
            device.kill()
    return device


def check_sums(found, device, expected):
    """Every update of a device in Node was taken, and what came of them is as expected."""
    kinds = device.kinds()
    assert kinds.count("accepted") == JOB["rounds"]
    assert not {"declined", "refused", "dropped", "untrusted"}.intersection(kinds)
    print(f"furthest {furthest(found, expected):.1e}")
    assert furthest(found, expected) < 1e-6
