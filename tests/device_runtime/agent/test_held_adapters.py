"""Adapters that come as differences: decoded, verified, and healed by a hello where they cannot be."""

from hashlib import sha256

import msgspec
import numpy as np
import pytest
from fleet import STEPS, first_adapter
from safetensors.numpy import load
from stage import locally, shifted

from fleetune.device_runtime.agent.held_adapters import HeldAdapters
from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.state_folder import StateFolder
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.codecs import make_codec, reference_of, unpack
from fleetune.device_runtime.contracts.deltas import make_delta
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Decline, Hello, Offer, Request, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.files import MemoryFiles

CODECS = [("xor", 0.0), ("fp32", 0.0), ("fp16", 0.0), ("int8", 0.0), ("topk", 0.05)]


def digest(content):
    return sha256(content).hexdigest()


class Difference:
    """Offers version 1 as its difference from what the device holds."""

    def __init__(self, stage, codec="int8", ratio=0.0, *, held=None, number=1, **changes):
        held = held or first_adapter()
        delta = make_delta(make_codec(codec, ratio), shifted(), held)
        self.stage, self.content = stage, delta.content
        self.outgoing = Outgoing(delta.payload)
        fields = {
            "job": "job", "round": number, "version": 1, "role": "train", "deadline_s": 0.0,
            "work": LocalWork(steps=STEPS, seed=1), "adapter": self.outgoing.manifest,
            "adapter_sha256": digest(delta.content), "down_codec": codec, "down_ratio": ratio,
            "reference": digest(to_bytes(held)), "is_exact": delta.content == to_bytes(shifted()),
        }  # fmt: skip
        self.offer = Offer(**fields | changes)

    def say(self):
        self.stage.aggregator.say(self.offer)
        self.stage.poll(2)
        return self

    def serve(self):
        (request,) = self.stage.aggregator.heard(Request)
        for chunk in self.outgoing.chunks(request):
            self.stage.aggregator.say(chunk)
        self.stage.poll(2)
        return self


@pytest.mark.parametrize(("codec", "ratio"), CODECS)
def test_a_difference_is_decoded_and_trained_from(stage, codec, ratio):
    sent = Difference(stage, codec, ratio).say().serve()
    stage.until("trained")
    stage.poll()
    update = stage.aggregator.heard(UpdateReady)[-1]
    payload, start = stage.pull(update), load(sent.content)
    values = unpack(make_codec("fp32"), payload, start).values
    assert np.array_equal(values["w"], locally(1, start)["w"])
    assert reference_of(payload) == ("" if sent.offer.is_exact else digest(sent.content))
    assert sent.offer.is_exact == (codec not in ("int8", "topk"))
    assert stage.device.agent._assignments.reference == digest(sent.content)


def test_only_a_difference_travels_and_then_nothing(stage):
    sent = Difference(stage, "int8").say().serve()
    stage.until("trained")
    assert sent.outgoing.manifest.size_bytes < len(to_bytes(shifted())) / 3
    stage.aggregator.heard()
    Difference(stage, "int8", number=2).say()
    assert stage.aggregator.heard(Request) == [], "what it decodes to is at hand"


def test_who_lacks_what_it_builds_on_says_once_what_it_has(stage):
    stage.poll()
    stage.aggregator.heard()
    stranger = {n: v + np.float32(1) for n, v in first_adapter().items()}
    late = Difference(stage, held=stranger)
    late.say().say()
    (hello,) = stage.aggregator.heard(Hello)
    assert hello.holds == digest(to_bytes(first_adapter()))
    assert stage.aggregator.heard(Request, Decline) == []
    Difference(stage).say().serve()
    stage.until("trained")
    late.say()
    assert "declined" not in stage.device.kinds()


def test_who_lacks_what_it_builds_on_is_due_at_once(stage):
    stage.poll()
    stranger = {n: v + np.float32(1) for n, v in first_adapter().items()}
    agent, link = stage.device.agent, stage.device.link
    stage.aggregator.say(Difference(stage, held=stranger).offer)
    agent.take(*link.receive(0), stage.now)
    assert agent.due_at(stage.now) <= stage.now


def corrupt(sent):
    return {"adapter_sha256": "0" * 64}


def truncated(sent):
    payload = b"\x80"
    sent.outgoing = Outgoing(payload)
    return {"adapter": sent.outgoing.manifest}


@pytest.mark.parametrize("damage", [corrupt, truncated])
def test_what_decodes_to_something_else_is_never_trained_from_and_the_whole_is_asked_for(
    stage, caplog, damage
):
    stage.poll()
    sent = Difference(stage)
    sent.offer = msgspec.structs.replace(sent.offer, **damage(sent))
    sent.say().serve()
    assert "version 1: asking for the whole adapter" in caplog.text
    assert [hello.holds for hello in stage.aggregator.heard(Hello)] == [""]
    assert "trained" not in stage.device.kinds()
    assert not list(stage.device.folder.glob("adapter*"))
    stage.aggregator.offer(1, adapter=shifted())
    stage.poll(2)
    (request,) = stage.aggregator.heard(Request)
    for chunk in stage.aggregator.outgoing.chunks(request):
        stage.aggregator.say(chunk)
    stage.until("trained")
    stage.poll()
    stage.aggregator.heard()
    Difference(stage, number=2).say()
    assert [hello.holds for hello in stage.aggregator.heard(Hello)] == [""], "for good"


def test_a_whole_adapter_that_is_not_the_one_meant_is_declined(stage):
    sent = Difference(stage, down_codec="full", reference="", adapter_sha256="0" * 64)
    sent.say().serve()
    (declined,) = stage.aggregator.heard(Decline)
    assert declined.reason == f"adapter: SHA-256 of what was sent is not '{'0' * 64}'"


def test_an_unknown_down_codec_is_declined(stage):
    Difference(stage, down_codec="zip").say()
    (declined,) = stage.aggregator.heard(Decline)
    assert "no codec 'zip'" in declined.reason


def test_a_difference_of_an_impossible_size_is_declined(stage):
    sent = Difference(stage)
    huge = Outgoing(bytes(100_000)).manifest
    sent.offer = msgspec.structs.replace(sent.offer, adapter=huge)
    sent.say()
    (declined,) = stage.aggregator.heard(Decline)
    assert "transfer refused: 100000 bytes" in declined.reason


def test_a_killed_device_goes_on_from_the_replica(stage):
    sent = Difference(stage).say().serve()
    while sum(e.kind == "step" for e in stage.device.events) < 3:
        stage.poll()
    stage.device.kill()
    stage.device.start()
    stage.poll()
    assert stage.aggregator.heard(Hello)[-1].holds == digest(sent.content)
    sent.say()
    assert stage.aggregator.heard(Request) == []
    stage.until("trained")
    stage.poll()
    update = stage.aggregator.heard(UpdateReady)[-1]
    start = load(sent.content)
    values = unpack(make_codec("fp32"), stage.pull(update), start).values
    assert np.array_equal(values["w"], locally(1, start)["w"])


class Written(MemoryFiles):
    """Files that tell what was written, and read."""

    def __init__(self):
        super().__init__()
        self.written, self.num_read = [], 0

    def write(self, name, content):
        self.written.append(content)
        super().write(name, content)

    def read(self, name):
        self.num_read += 1
        return super().read(name)


@pytest.fixture
def files():
    return Written()


def held_in(files):
    return HeldAdapters(StateFolder(files), FirstAdapter.of(first_adapter()))


def test_what_lies_there_already_is_not_written_again_nor_read_for_another(files):
    held, content = held_in(files), to_bytes(shifted())
    for _ in range(2):
        held.keep(content, digest(content))
    assert files.written == [content]
    again, files.num_read = held_in(files), 0
    again.keep(content, digest(content))
    assert (again.find("0" * 64), files.num_read) == (None, 0)
    assert (again.find(digest(content)), files.written) == (content, [content])


def test_what_was_damaged_since_is_not_found_and_is_written_again(files):
    held, content = held_in(files), to_bytes(shifted())
    held.keep(content, digest(content))
    files.write("adapter.safetensors", content[:-1] + b"x")
    assert held.find(digest(content)) is None
    held.keep(content, digest(content))
    assert held.find(digest(content)) == content


def test_what_nobody_has_looked_at_is_looked_at(files):
    held, content = held_in(files), to_bytes(shifted())
    manifest = Outgoing(content).manifest
    offer = Offer(
        job="job", round=1, version=1, role="train", deadline_s=0.0, work=LocalWork(steps=1), adapter=manifest
    )
    assert held.open(offer, content) == content
    assert held.open(offer, content, known=manifest.sha256) == content
    with pytest.raises(WireError, match="SHA-256 of what was sent"):
        held.open(offer, content + b"x")
