import logging
import os
import signal
import sys

import children
import numpy as np
import pytest
from fleet import Measure
from layered import LayeredStage, first, moved, name_of, trained, work_of
from paths import ROOT

from fleetune.device_runtime.agent.personal_layers import PersonalLayers
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.files import DiskFiles

CODECS = {"fp32": 0.0, "fp16": 0.0, "int8": 0.0, "topk": 0.1, "xor": 0.0}
every_codec = pytest.mark.parametrize("codec", CODECS)


def layers_of(folder, *, job="job", artifact="a" * 64, device_id="device-3"):
    return PersonalLayers(DiskFiles(folder), job=job, artifact=artifact, device_id=device_id)


def own(value, layer=1):
    return {name_of(layer): np.full(400, value, np.float32)}


def same(left, right):
    return left.keys() == right.keys() and all(np.array_equal(left[n], right[n]) for n in left)


def test_a_run_starts_from_the_version_with_the_layers_that_stayed_over_it(tmp_path):
    layers_of(tmp_path).keep(1, own(7))
    start = layers_of(tmp_path).over(first(), 2)
    assert same(start, {**first(), **own(7)})
    assert all(value.flags.writeable for value in start.values())
    assert same(layers_of(tmp_path).over(first(), 1), first()), "a run done again starts as it did"


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:-1] + b"\x01", lambda b: b"", lambda b: b"\xff" * 9]
)
def test_a_damaged_file_is_named_once_and_the_global_layers_taken(tmp_path, caplog, damage):
    layers_of(tmp_path).keep(1, own(7))
    (path,) = tmp_path.glob("personal-*")
    path.write_bytes(damage(path.read_bytes()))
    personal = layers_of(tmp_path)
    assert same(personal.over(first(), 2), first())
    assert same(personal.over(first(), 2), first())
    (record,) = caplog.records
    assert f"{path.name}: damaged; the layers in it start from the global ones" in record.message


@pytest.mark.parametrize("other", [{"job": "another"}, {"artifact": "b" * 64}, {"device_id": "device-4"}])
def test_layers_of_another_job_artifact_or_device_are_named_once_and_left(tmp_path, caplog, other):
    layers_of(tmp_path).keep(1, own(7))
    stranger = layers_of(tmp_path, **other)
    for _ in range(2):
        assert same(stranger.over(first(), 2), first())
    stranger.settle(1, accepted=False)
    (record,) = caplog.records
    assert "personal layers of another job, artifact or device; not used here" in record.message
    assert same(layers_of(tmp_path).over(first(), 2), {**first(), **own(7)})


@pytest.mark.parametrize(
    "wrong",
    [
        {"layer9.a": np.ones(400, np.float32)},
        {name_of(1): np.ones(3, np.float32)},
        {name_of(1): np.ones(400)},
    ],
)
def test_layers_of_another_shape_are_not_used(tmp_path, caplog, wrong):
    layers_of(tmp_path).keep(1, wrong)
    assert same(layers_of(tmp_path).over(first(), 2), first())
    assert f"{next(iter(wrong))} is not of this model; all start from the global ones" in caplog.text


def test_a_state_folder_of_before_says_nothing(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG):
        assert same(layers_of(tmp_path).over(first(), 5), first())
    assert caplog.records == []
    assert list(tmp_path.iterdir()) == []


def test_kept_layers_do_not_travel_and_the_bytes_fall(tmp_path):
    whole = len(LayeredStage(tmp_path / "0", kept={}).settled(1, first(), work=work_of(1, personal=0)))
    payload = LayeredStage(tmp_path / "2", kept={1: (0, 2)}).settled(1, first(), work=work_of(1, personal=2))
    sent = decode_update(payload, first())
    assert sorted(sent) == ["head", name_of(1)]
    wanted = trained(work_of(1), first())
    assert all(np.array_equal(sent[name], wanted[name]) for name in sent)
    assert whole - len(payload) >= 2 * first()[name_of(0)].nbytes


@every_codec
def test_the_next_round_starts_from_the_global_layers_and_the_own(tmp_path, codec):
    """Global layer 1 and head moved; layer 0 stayed, is trained on, and travels whole when it is shared again."""
    stage = LayeredStage(tmp_path, kept={1: (0,), 2: (2,)})
    with_codec = {"codec": codec, "codec_ratio": CODECS[codec]}
    stage.settled(1, first(), work=work_of(1, **with_codec))
    after, newer = trained(work_of(1), first()), moved(first(), 0.25)
    payload = stage.settled(2, newer, work=work_of(2, **with_codec))
    start = {**newer, name_of(0): after[name_of(0)]}
    assert same(stage.starts[1][1], start)
    sent, owed = decode_update(payload, newer), memory_of(stage)
    wanted = trained(work_of(2), start)
    debts = {n: after[n] - sent_of_round_1(tmp_path, with_codec)[n] for n in (name_of(1), "head")}
    assert sorted(sent) == ["head", name_of(0), name_of(1)]
    for name in sent:
        conveyed = sent[name] + owed.get(name, 0.0) - debts.get(name, 0.0)
        np.testing.assert_allclose(conveyed, wanted[name], atol=1e-6)
    tolerance = {"fp32": 0.0, "fp16": 2e-3, "int8": 2e-2, "topk": 3.0, "xor": 0.0}[codec]
    np.testing.assert_allclose(sent[name_of(0)], wanted[name_of(0)], atol=tolerance)


def memory_of(stage):
    """What the codec owes now, by tensor."""
    found = stage.device.agent._assignments._memory.before(99)
    return {name.removeprefix("residual/"): value for name, value in found.items()}


def sent_of_round_1(tmp_path, with_codec):
    stage = LayeredStage(tmp_path / "again", kept={1: (0,)})
    return decode_update(stage.settled(1, first(), work=work_of(1, **with_codec)), first())


def test_a_kept_layer_owes_nothing_new_and_what_it_owed_before_waits(tmp_path):
    """Round 1 shares layer 0 and owes; round 2 keeps it; round 3 shares it, and its value with the old debt travels."""
    stage = LayeredStage(tmp_path, kept={1: (1,), 2: (0,), 3: (1,)})
    stage.settled(1, first(), work=work_of(1, codec="int8"))
    debt = memory_of(stage)[name_of(0)]
    assert debt.any()
    sent = decode_update(stage.settled(2, first(), work=work_of(2, codec="fp32")), first())
    assert name_of(0) not in sent
    assert np.array_equal(memory_of(stage)[name_of(0)], debt), "what a device keeps to itself it does not owe"
    payload = stage.settled(3, first(), work=work_of(3, codec="fp32"))
    wanted = trained(work_of(3), stage.starts[2][1])[name_of(0)]
    sent = decode_update(payload, first())[name_of(0)]
    np.testing.assert_array_equal(sent, (wanted.astype(np.float64) + debt).astype(np.float32))
    assert np.abs(memory_of(stage)[name_of(0)]).max() < 1e-6, "paid, but for what float32 rounds off"


def test_a_layer_shared_again_goes_on_from_the_global_one(tmp_path):
    stage = LayeredStage(tmp_path, kept={1: (0,), 2: (1,), 3: (1,)})
    for number in (1, 2):
        stage.settled(number, first())
    newest = moved(first(), 0.5)
    stage.settled(3, newest)
    own_1 = trained(work_of(2), stage.starts[1][1])[name_of(1)]
    assert same(stage.starts[2][1], {**newest, name_of(1): own_1})


def test_a_layer_that_rests_travels_once_it_is_shared_and_not_while_it_is_global(tmp_path):
    stage = LayeredStage(tmp_path, kept={1: (0,)}, idle=(2,))
    assert name_of(2) not in decode_update(stage.settled(1, first()), first())


def run_of(folder, *, rounds=3, disturb=lambda stage: None):
    """Payloads of three rounds; ``disturb`` is called before each."""
    stage = LayeredStage(folder, kept={1: (0,), 2: (0, 1), 3: (2,)})
    payloads = []
    for number in range(1, rounds + 1):
        disturb(stage)
        payloads.append(stage.settled(number, moved(first(), number / 8), work=work_of(number, codec="int8")))
    return payloads


def test_a_restart_between_rounds_changes_nothing(tmp_path):
    assert run_of(tmp_path / "a", disturb=LayeredStage.restart) == run_of(tmp_path / "b")


@pytest.mark.parametrize("polls", [1, 2, 3, 4, 5])
def test_a_kill_in_the_middle_of_a_round_changes_nothing(tmp_path, polls):
    stage = LayeredStage(tmp_path / "a", kept={1: (0,), 2: (0, 1)})
    payloads = [stage.settled(1, moved(first(), 1 / 8), work=work_of(1, codec="int8"))]
    second = moved(first(), 2 / 8)
    stage.offer(2, second, work=work_of(2, codec="int8"))
    for _ in range(polls):
        stage.served()
    stage.restart()
    payloads.append(stage.pull(stage.round(2, second, work=work_of(2, codec="int8"))))
    assert payloads == run_of(tmp_path / "b", rounds=2)


CRASH = """
import os, signal, sys
from pathlib import Path
from fleet import Measure
from layered import LayeredStage, first, moved, work_of
from fleetune.device_runtime.agent.outbox_file import OutboxFile
stage = LayeredStage(Path(sys.argv[1]), kept={1: (0,), 2: (0, 1)})
stage.settled(1, moved(first(), 1 / 8), work=work_of(1, codec="int8"))
OutboxFile.put = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
stage.round(2, moved(first(), 2 / 8), work=work_of(2, codec="int8"))
"""


def test_a_sigkill_between_keeping_and_announcing_changes_nothing(tmp_path):
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
    killed = children.start(
        [sys.executable, "-c", CRASH, tmp_path / "a"], env={**os.environ, "PYTHONPATH": path}
    )
    assert killed.wait(60) == -signal.SIGKILL
    assert len(list((tmp_path / "a" / "device-3").glob("personal-*"))) == 2, (
        "round 2's is kept beside round 1's"
    )
    stage = LayeredStage(tmp_path / "a", kept={1: (0,), 2: (0, 1)})
    update = stage.round(2, moved(first(), 2 / 8), work=work_of(2, codec="int8"))
    assert [stage.pull(update)] == run_of(tmp_path / "b", rounds=2)[1:]


def test_after_a_refusal_the_layers_are_as_before_it(tmp_path):
    stage = LayeredStage(tmp_path, kept={1: (0,), 2: (1,), 3: ()})
    stage.settled(1, first())
    before = stage.device.agent._assignments._personal.before(99)
    stage.settled(2, first(), accepted=False)
    stage.settled(3, first())
    assert same(stage.starts[2][1], {**first(), **before})


def test_work_that_keeps_no_layer_starts_from_the_version_alone(tmp_path):
    stage = LayeredStage(tmp_path, kept={1: (0,)})
    stage.settled(1, first())
    stage.settled(2, first(), work=work_of(2, personal=0))
    assert same(stage.starts[1][1], first())
    assert list(stage.device.folder.glob("personal-*")) == []


def test_the_owner_is_given_the_version_with_the_own_layers(tmp_path):
    stage = LayeredStage(tmp_path, kept={1: (0,), 2: (0,)})
    stage.settled(1, first())
    newer = moved(first(), 0.25)
    stage.settled(2, newer)
    kept = trained(work_of(2), stage.starts[1][1])[name_of(0)]
    assert same(stage.own[1], {**newer, name_of(0): kept})
    stage.settled(3, newer, work=work_of(3, personal=0))
    assert len(stage.own) == 2


def test_both_models_are_measured_on_what_was_held_back(tmp_path):
    def held_out(adapter):
        mean = float(np.mean(adapter[name_of(0)], dtype=np.float64))
        return Measure(mean, mean / 2, 9)

    stage = LayeredStage(tmp_path, kept={1: (0,)}, held_out=held_out)
    stats = stage.round(1, first()).stats
    mine, everyones = (held_out(a) for a in (trained(work_of(1), first()), first()))
    assert (stats["personal_loss"], stats["personal_accuracy"]) == tuple(mine)[:2]
    assert (stats["global_loss"], stats["global_accuracy"]) == tuple(everyones)[:2]
    stats = stage.round(2, first(), work=work_of(2, personal=0)).stats
    assert "personal_loss" not in stats


def test_nothing_held_back_is_not_measured(tmp_path):
    assert "personal_loss" not in LayeredStage(tmp_path, kept={1: (0,)}).round(1, first()).stats
