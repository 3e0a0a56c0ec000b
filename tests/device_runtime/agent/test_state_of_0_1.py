"""A state folder that release 0.1.0 (commit 067caa4) left: an update without a verdict, what int8 owed, and round 2 half done.

``tests/data/device_0_1`` was made by that release's own fleet and stage, of size 30: round 1 offered with seed 1 and int8,
trained, no verdict; round 2 with seed 2 from the adapter plus 0.25, killed after three of four steps, one past a checkpoint.
"""

import shutil
from hashlib import sha256

import numpy as np
import pytest
from fleet import STEPS, LinearTraining, first_adapter, points_of
from paths import ROOT
from safetensors.numpy import load_file
from stage import NAME, Stage

from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.wire import Request, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork

OLD = ROOT / "tests" / "data" / "device_0_1"
SIZE = 30


@pytest.fixture
def stage(tmp_path):
    shutil.copytree(OLD, tmp_path / NAME)
    return Stage(tmp_path, size=SIZE)


def second_adapter():
    return {
        name: (value + np.float32(0.25)).astype(np.float32) for name, value in first_adapter(SIZE).items()
    }


def test_what_it_owed_is_announced_and_delivered(stage):
    stage.poll(2)
    (update,) = stage.aggregator.heard(UpdateReady)
    assert (update.round, update.version, update.codec) == (1, 0, "int8")
    payload = stage.pull(update)
    assert sha256(payload).hexdigest() == update.payload.sha256
    assert decode_update(payload, first_adapter(SIZE)).keys() == {"w", "b"}
    stage.aggregator.verdict(update)
    stage.poll()
    assert stage.device.outbox.pending() == []
    assert stage.device.outbox.recall("device_id") == NAME.encode()


def test_what_it_did_is_not_done_again(stage):
    work = LocalWork(steps=STEPS, seed=1, codec="int8")
    stage.aggregator.offer(1, adapter=first_adapter(SIZE), work=work)
    stage.poll(3)
    assert len(stage.aggregator.heard(UpdateReady)) == 1
    assert stage.device.kinds() == []


def test_round_2_goes_on_from_its_checkpoint_with_the_adapter_and_what_was_owed(stage):
    stage.poll(2)
    (first,) = stage.aggregator.heard(UpdateReady)
    stage.aggregator.verdict(first)
    stage.aggregator.offer(2, adapter=second_adapter(), work=LocalWork(steps=STEPS, seed=2))
    stage.until("trained")
    stage.poll()
    (update,) = stage.aggregator.heard(Request, UpdateReady)
    assert isinstance(update, UpdateReady), "the adapter is at hand"
    assert [e.values["step"] for e in stage.device.events if e.kind == "step"] == [3, 4]
    found = decode_update(stage.pull(update), second_adapter())
    training = LinearTraining(points_of(3, SIZE), LocalWork(steps=STEPS, seed=2), second_adapter())
    while not training.done:
        training.step()
    owed = load_file(OLD / "residual-000001.safetensors")
    np.testing.assert_array_equal(found["w"], (training.adapter["w"] + owed["w"]).astype(np.float32))
