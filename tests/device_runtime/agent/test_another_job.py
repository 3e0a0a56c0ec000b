"""A state folder serves one job after another: nothing of one gets into what another is given, and nothing is lost."""

import numpy as np
import pytest
from fleet import ARTIFACT, STEPS, first_adapter
from stage import NAME, Stage, locally, shifted

from fleetune.device_runtime.agent.outbox import Entry, MemoryOutbox
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.wire import Decline, Hello, Request, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork

OTHER = "b" * 64


@pytest.fixture
def act(tmp_path, monkeypatch):
    """Begin a life of the device in the same folder, in a job of this name."""
    open_stages = []

    def begin(job="job", **options):
        for before in open_stages:
            before.device.kill()
        for module in ("fleet", "stage"):
            monkeypatch.setattr(f"{module}.JOB", job)
        open_stages[:] = [Stage(tmp_path, **options)]
        return open_stages[0]

    return begin


def six_rounds_of_int8(stage, size=3000):
    for number in range(1, 7):
        work = LocalWork(steps=STEPS, seed=number, codec="int8")
        update = stage.trained(number, work=work, adapter=first_adapter(size))
        stage.aggregator.verdict(update)
        stage.poll()


@pytest.mark.parametrize("size", [3000, 2000], ids=["the same model", "another model"])
@pytest.mark.parametrize("ways", [{"job": "second"}, {"artifact": OTHER}], ids=["job", "artifact"])
def test_what_one_job_owes_is_not_sent_in_another(act, ways, size):
    six_rounds_of_int8(act())
    second = act(**({"artifact": OTHER} if size == 2000 else {}) | ways, size=size)
    update = second.trained(9, adapter=first_adapter(size))
    values = decode_update(second.pull(update), first_adapter(size))
    assert "declined" not in second.device.kinds()
    if size == 3000:
        np.testing.assert_array_equal(values["w"], locally(9)["w"])


def test_a_device_of_another_model_does_not_offer_the_old_adapter_as_reference(act):
    first = act()
    first.aggregator.offer(2, adapter=shifted())
    first.poll(2)
    (request,) = first.aggregator.heard(Request)
    for chunk in first.aggregator.outgoing.chunks(request):
        first.aggregator.say(chunk)
    first.until("trained")
    assert first.device.agent._assignments.reference != first.device.adapter.digest
    second = act("second", size=2000, artifact=OTHER)
    second.poll()
    (hello,) = second.aggregator.heard(Hello)
    assert hello.holds == second.device.adapter.digest


def test_an_update_of_another_artifact_waits_aside_and_is_delivered_when_that_comes_back(act):
    first = act()
    owed = first.trained(1)
    second = act(artifact=OTHER)
    second.poll(2)
    assert second.aggregator.heard(UpdateReady) == []
    again = second.trained(1)
    assert (again.round, "step" in {e.kind for e in second.device.events}) == (1, True), "trained, not found"
    third = act(artifact=ARTIFACT)
    third.poll(2)
    (announced,) = third.aggregator.heard(UpdateReady)
    assert announced.payload.sha256 == owed.payload.sha256
    assert third.aggregator.heard(Decline) == []


@pytest.fixture(params=["disk", "memory"])
def outbox(request, tmp_path):
    if request.param == "memory":
        yield MemoryOutbox()
        return
    with OutboxFile(tmp_path / "outbox.sqlite") as opened:
        yield opened


def test_what_names_no_artifact_is_that_of_the_first_that_claims_it(outbox):
    entry = Entry("a_b", "t1", "d", b"header", b"payload")
    outbox.put(
        entry, facts={"made/a_b/t1": b"x", "session/a_b": b"s", "made/aXb/t1": b"y", "device_id": b"pi"}
    )
    outbox.claim("a_b", "one")
    assert (outbox.pending(), outbox.recall("made/a_b/t1")) == ([entry], b"x")
    outbox.claim("a_b", "two")
    assert [e.job for e in outbox.pending()] == ["a_b@one"]
    assert (outbox.recall("made/a_b/t1"), outbox.recall("session/a_b")) == (None, None)
    assert (outbox.recall("made/aXb/t1"), outbox.recall("device_id")) == (b"y", b"pi")
    outbox.claim("a_b", "one")
    assert (outbox.pending(), outbox.recall("made/a_b/t1"), outbox.recall("session/a_b")) == (
        [entry],
        b"x",
        b"s",
    )


def test_the_name_of_the_device_stays(act):
    assert act().device.name == act("second").device.name == NAME
