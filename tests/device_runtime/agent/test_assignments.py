import logging

import msgspec
import numpy as np
import pytest
from fleet import JOB, STEPS, first_adapter, workbench_of
from stage import Stage, locally, shifted

from fleetune.device_runtime.agent.offer_keys import key_of, key_of_0_1
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.wire import (
    Decline,
    Offer,
    Request,
    TransferManifest,
    UpdateReady,
    Verdict,
)
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import ConfigError


def test_it_trains_what_is_offered_and_delivers_it(stage):
    update = stage.trained()
    assert (update.round, update.version, update.codec, update.num_samples) == (1, 0, "fp32", 8)
    assert update.stats.keys() == {"loss", "loss_first", "active_layers", "seconds"}
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


def test_two_tasks_of_one_round_are_two_things_to_deliver(stage):
    work = LocalWork(steps=STEPS, seed=1)
    first = stage.trained(1, task_id="t-a", work=work)
    stage.aggregator.offer(1, task_id="t-b", work=work)
    stage.until("trained")
    stage.poll(2)
    assert first.payload.sha256 in {e.digest for e in stage.device.outbox.pending()}, (
        "equal work, equal bytes"
    )
    assert [e.task_id for e in stage.device.outbox.pending()] == ["t-a", "t-b"]
    stage.aggregator.verdict(first)
    stage.poll()
    assert [e.task_id for e in stage.device.outbox.pending()] == ["t-b"]


def test_a_verdict_that_names_no_task_is_on_its_round(stage):
    update = stage.trained(1, task_id="t-a")
    stage.aggregator.say(Verdict(job=JOB, round=1, digest=update.payload.sha256, accepted=True))
    stage.poll()
    assert stage.device.kinds()[-1] == "accepted"


def test_what_is_settled_is_forgotten_in_the_end(stage):
    stage.aggregator.status("one")
    made = []
    for number in range(1, 8):
        made.append(stage.trained(number))
        assert stage.device.outbox.recall(f"made/{JOB}/{made[-1].task_id}"), "until there is a verdict"
        stage.aggregator.verdict(made[-1])
        stage.poll()
    left = [update for update in made if stage.device.outbox.recall(f"made/{JOB}/{update.task_id}")]
    assert (left, stage.device.kinds().count("accepted")) == ([], 7)
    assert len(stage.device.agent._assignments._done) == 1
    stage.aggregator.offer(7)
    stage.poll(3)
    assert stage.device.kinds().count("trained") == 7, "the last one is done"


def test_an_update_that_0_1_made_is_delivered_and_not_made_again(stage):
    update = stage.trained(1, task_id="train-1-device-3")
    stage.aggregator.heard()
    box, offer = stage.device.outbox, Offer(
        job=JOB, round=1, version=0, role="train", work=LocalWork(steps=STEPS, seed=1),
        adapter=stage.aggregator.outgoing.manifest, deadline_s=0.0,
    )  # fmt: skip
    (entry,) = box.pending()
    old = {n: v for n, v in msgspec.msgpack.decode(entry.header).items() if n != "task_id"}
    box.acknowledge(JOB, entry.task_id, entry.digest)
    box.put(entry._replace(task_id="round-1", header=msgspec.msgpack.encode(old)))
    box.forget(f"made/{JOB}/train-1-device-3")
    box.remember(f"made/{JOB}/1", key_of_0_1(offer).encode())
    stage.device.kill()
    stage.device.start()
    for _ in range(2):
        stage.aggregator.say(offer)
        stage.poll(3)
    (announced,) = {u.payload.sha256: u for u in stage.aggregator.heard(UpdateReady)}.values()
    assert announced.payload == update.payload
    stage.aggregator.verdict(announced)
    stage.poll()
    stage.aggregator.say(offer)
    stage.poll(3)
    assert stage.device.kinds().count("trained") == 1
    assert stage.device.outbox.pending() == []


def test_the_key_of_0_1_is_that_of_0_1():
    manifest = TransferManifest(size_bytes=1, chunk_bytes=1, chunk_digests=bytes(8), sha256="e" * 64)
    offer = Offer(
        job="j", round=2, version=1, role="train", adapter=manifest, deadline_s=0.0,
        work=LocalWork(policy=PolicySpec(name="exact-k", drop=0.5), steps=3, seed=9, codec="int8", rounds_before=1),
    )  # fmt: skip
    assert key_of_0_1(offer) == "558b44cb015eb578"


def test_fields_that_are_newer_than_a_checkpoint_leave_its_key_alone_until_they_say_something():
    """The key is what ``key_of`` gave before work had ``learns`` and a policy ``schedule``, computed there."""
    manifest = TransferManifest(size_bytes=1, chunk_bytes=1, chunk_digests=b"", sha256="ab")
    work = LocalWork(
        policy=PolicySpec(name="suffix", drop=0.5), optimizer=OptimizerSpec(proximal=0.1), steps=4, seed=7, codec="topk",
        codec_ratio=0.1, rounds_before=3,
    )  # fmt: skip
    offer = Offer(
        job="home",
        task_id="t-7",
        round=3,
        version=2,
        role="train",
        work=work,
        adapter=manifest,
        deadline_s=0.0,
    )
    assert key_of(offer) == "90670177c7e7b59e"
    others = (
        {"rank": 2}, {"personal": 1}, {"held_out": 0.25}, {"frozen": "lora-a"}, {"learns": "class-means"}, {"cache_below": 0},
        {"policy": msgspec.structs.replace(work.policy, protected=1)},
    )  # fmt: skip
    asked = [msgspec.structs.replace(offer, work=msgspec.structs.replace(work, **other)) for other in others]
    told = ({"mask_sha256": "c" * 64}, {"memory": "d" * 64}, {"mask_sha256": "c" * 64, "memory": "d" * 64})
    asked += [msgspec.structs.replace(offer, **other) for other in told]
    assert len({key_of(other) for other in (offer, *asked)}) == 1 + len(others) + len(told)


def third_update(folder, *, late):
    """SHA-256 of what is sent in round 3, by a codec that owes; ``late`` gives both verdicts before it, once both are made."""
    stage, made = Stage(folder), []
    for number in (1, 2):
        made.append(stage.trained(number, work=LocalWork(steps=STEPS, seed=number, codec="int8")))
        if not late:
            stage.aggregator.verdict(made[-1])
            stage.poll()
    if late:
        late(stage, made)
    assert stage.device.outbox.pending() == []
    return stage.trained(3, work=LocalWork(steps=STEPS, seed=3, codec="int8")).payload.sha256


def told(stage, made):
    for update in made:
        stage.aggregator.verdict(update)
        stage.poll()


def told_after_a_kill(stage, made):
    stage.device.kill()
    stage.device.start()
    told(stage, made)


@pytest.mark.parametrize("late", [told, lambda stage, made: told(stage, made[::-1]), told_after_a_kill])
def test_a_late_verdict_leaves_what_later_rounds_owe(tmp_path, late):
    assert third_update(tmp_path / "late", late=late) == third_update(tmp_path / "soon", late=None)
