"""Skip effects against hand-made ones, and where they are kept."""

import json
import mmap
from pathlib import Path

import msgspec
import numpy as np
import pytest

from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.manifest import Input, Section, Targets
from fleetune.device_runtime.contracts.plans import Mode, dropping
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset, text_dataset
from fleetune.device_runtime.data.samples import Dense, Ragged, make_dataset
from fleetune.device_runtime.draws import Key, permutation
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods.protection import EFFECTS
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.skip_effects import NUM_EXAMPLES, KeptEffects, skip_effects
from fleetune.device_runtime.training.trainer import Trainer

BY_EFFECT = PolicySpec(name="exact-k", drop=0.5, protected=1, protect="effect")
WORK = LocalWork(policy=BY_EFFECT, batch_size=8, steps=6, seed=3)


@pytest.fixture(scope="module")
def artifact(word_artifact):
    return open_artifact(word_artifact)


@pytest.fixture(scope="module")
def words(artifact, word_file):
    return load_dataset(word_file, artifact.manifest, artifact.folder, seq_len=16)


@pytest.fixture(scope="module")
def engine(artifact):
    with open_engine(artifact, threads=1) as engine:
        yield engine


@pytest.fixture(scope="module")
def adapter(artifact):
    rng = np.random.default_rng(0)
    return {n: rng.normal(0, 0.2, a.shape).astype(np.float32) for n, a in artifact.adapter().items()}


def test_effects_are_those_of_the_steps_own_logits(engine, words, adapter):
    """Each example alone, its logits from a training step that drops the layer; the hundred examples by the draw of the seed."""
    chosen = permutation(Key(3, "effects", 0), words.num_samples)[:NUM_EXAMPLES]
    assert len(set(chosen)) == 100 < words.num_samples

    def logits(index, dropped):
        batch = words.rows(np.array([index]))
        found = engine.step(batch, dropping(4, dropped), adapter, keep_logits=True)
        return found.logits[0].astype(np.float64)

    whole = [logits(i, ()) for i in chosen]
    wanted = []
    for layer in range(4):
        alone = [logits(i, (layer,)) for i in chosen]
        cosines = [a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) for a, b in zip(whole, alone, strict=True)]
        wanted.append(1 - np.mean(cosines))
    found = skip_effects(engine, words, adapter, seed=3)
    assert found == pytest.approx(wanted, abs=1e-5)
    assert min(found) > 1e-4
    assert found != skip_effects(engine, words, adapter, seed=4)
    assert found == skip_effects(engine, words, adapter, seed=3)


def linear_data(manifest, text_folder):
    inputs = text_dataset(["sad tears", "glad", "mad rage shout", "cry"], manifest, text_folder, seq_len=8)
    columns = {**inputs.columns, "labels": Dense(np.array([0, 1, 2, 0]))}
    return make_dataset(columns, inputs.lengths, seq_len=8, num_classes=3)


def test_a_layer_that_does_nothing_has_no_effect(linear_stack, make_manifest, text_folder):
    manifest = make_manifest()
    stack, data = linear_stack(manifest), linear_data(manifest, text_folder)
    adapter = stack.adapter()
    adapter["layer0.a"] = np.zeros((8, 8), np.float32)
    adapter["layer1.a"] = -2 * np.eye(8, dtype=np.float32)  # turns the answer round
    effects = skip_effects(stack, data, adapter, seed=0)
    assert effects[0] == 0
    assert effects[1] == pytest.approx(2, abs=1e-6)
    assert 0 < effects[2] < 2
    adapter["head.w"] = np.zeros_like(adapter["head.w"])
    assert (
        skip_effects(stack, data, adapter, seed=0) == [0.0] * 3
    )  # an answer that says nothing tells nothing


class TokenStack:
    """Hidden streams (B, S, 2) turned by an angle at each layer, which are the logits."""

    def __init__(self, manifest):
        self.artifact = Artifact(Path(), manifest, "d" * 64, mmap.mmap(-1, 1))

    def rows(self, size, tokens=0, memory=None):
        return Rows()

    def predict(self, batch, adapter, *, rows, plan):
        turned = sum(adapter["angles"][i] for i, mode in enumerate(plan) if mode is not Mode.DROP)
        angles = batch["input_ids"] * turned
        return np.stack([np.cos(angles), np.sin(angles)], -1).astype(np.float32)

    def predict_at(self, batch, adapter, positions, *, rows, plan):
        logits = self.predict(batch, adapter, rows=rows, plan=plan)
        return logits[np.arange(len(logits)), positions]


@pytest.mark.parametrize(
    ("targets", "turns"),
    [(Targets(shift=0, ignored=-100), [1, 3, 2]), (Targets(shift=1, ignored=-100), [3, 5])],
    ids=["tokens that count", "last tokens"],
)
def test_of_tokens_those_that_count_are_compared(make_manifest, targets, turns):
    """A layer of angle a turns a token x by a x: its effect is 1 - cos(a x), of the mean over the tokens that count."""
    inputs = (
        Input("input_ids", "int64", ("batch", "seq"), 0),
        Input("labels", "int64", ("batch", "seq"), -100, role="labels"),
    )
    head = Section({}, targets=targets, counted=targets)
    stack = TokenStack(make_manifest(inputs=inputs, head=head))
    ids, labels = np.array([1, 4, 3, 2, 5]), np.array([0, -100, 1, 2, -100])
    lengths = np.array([3, 2])
    columns = {
        "input_ids": Ragged(ids, lengths, 0, "int64"),
        "labels": Ragged(labels, lengths, -100, "int64"),
    }
    data = make_dataset(columns, lengths, seq_len=8, num_classes=2, label_name="labels")
    angles = [0.1, 0.0, 0.4]
    found = skip_effects(stack, data, {"angles": np.array(angles)}, seed=0)
    if not targets.shift:
        columns["labels"] = Ragged(np.full(5, -100), lengths, -100, "int64")
        silent = make_dataset(columns, lengths, seq_len=8, num_classes=2, label_name="labels")
        with pytest.raises(ConfigError, match="skip effects: no label of the samples counts"):
            skip_effects(stack, silent, {"angles": np.array(angles)}, seed=0)
    assert found == pytest.approx([np.mean([1 - np.cos(a * x) for x in turns]) for a in angles], abs=1e-6)


def test_answers_that_are_not_finite_are_refused(linear_stack, make_manifest, text_folder):
    manifest = make_manifest()
    stack, data = linear_stack(manifest), linear_data(manifest, text_folder)
    adapter = stack.adapter() | {"head.w": np.full((8, 3), np.nan, np.float32)}
    with pytest.raises(ConfigError, match="skip effects: the logits are not finite"):
        skip_effects(stack, data, adapter, seed=0)


def test_an_engine_answers_without_the_layers_that_a_plan_drops(engine, words, adapter):
    batch = words.rows(np.arange(5))
    wanted = engine.step(batch, dropping(4, (1, 3)), adapter, keep_logits=True).logits
    for rest in (Mode.TRAIN, Mode.FORWARD, Mode.BYPASS):
        found = engine.predict(batch, adapter, plan=(rest, Mode.DROP, rest, Mode.DROP))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(
        engine.predict(batch, adapter), engine.predict(batch, adapter, plan=dropping(4, ()))
    )
    with pytest.raises(ConfigError, match="plan of 2 layers; the model has 4"):
        engine.predict(batch, adapter, plan=(Mode.TRAIN,) * 2)


def counted(engine, monkeypatch):
    asked, real = [], engine.predict
    monkeypatch.setattr(
        engine, "predict", lambda *rest, **more: (asked.append(more["plan"]), real(*rest, **more))[1]
    )
    return asked


def test_they_are_measured_once_and_kept_through_rounds_and_restarts(
    engine, words, adapter, tmp_path, monkeypatch
):
    asked = counted(engine, monkeypatch)
    first = KeptEffects(engine, tmp_path / "cache").of(words, WORK, adapter)
    assert set(asked) == {dropping(4, ()), *(dropping(4, {i}) for i in range(4))}
    asked.clear()
    later = msgspec.structs.replace(WORK, rounds_before=2, seed=99)
    moved = {name: array + 1 for name, array in adapter.items()}
    again = KeptEffects(engine, tmp_path / "cache")
    assert again.of(words, later, moved) == again.of(words, WORK, adapter) == first
    assert not asked
    for work, start in ((WORK, moved), (msgspec.structs.replace(WORK, seed=4), adapter)):  # runs of their own
        assert again.of(words, work, start) != first
    assert asked
    assert again.of(words.subset(np.arange(60)), later, moved) != first


@pytest.mark.parametrize("content", [b"", b"{", b'{"artifact":1}', b"\xff"])
def test_a_damaged_file_is_measured_again(engine, words, adapter, tmp_path, content):
    kept = KeptEffects(engine, tmp_path)
    first = kept.of(words, WORK, adapter)
    (tmp_path / "skip-effects.json").write_bytes(content)
    assert kept.of(words, WORK, adapter) == first
    assert json.loads((tmp_path / "skip-effects.json").read_text())["effects"] == first


def test_a_disk_without_room_costs_a_measurement_and_no_run(engine, words, adapter, tmp_path, caplog):
    (tmp_path / "cache").write_text("a file where the folder should be")
    assert len(KeptEffects(engine, tmp_path / "cache").of(words, WORK, adapter)) == 4
    assert "measured again after a restart" in caplog.text


def test_a_machine_measures_for_who_needs_them_and_for_nobody_else(artifact, words, adapter, tmp_path):
    with Machine(artifact, Resources(threads=1), folder=tmp_path / "cache") as machine:
        for policy in (PolicySpec(), PolicySpec(name="exact-k", drop=0.5, protected=1)):
            machine.trainer(words, msgspec.structs.replace(WORK, policy=policy), adapter).step()
        assert not (tmp_path / "cache").exists()
        trainer = machine.trainer(words, WORK, adapter)
        trainer.step()
        trainer.save(tmp_path / "c.safetensors")
        found = json.loads((tmp_path / "cache" / "skip-effects.json").read_text())
        assert found["effects"] == skip_effects(machine.engine, words, adapter, seed=3)
        turned = [-effect for effect in found["effects"]]
        resumed = Trainer(machine.engine, words, WORK, adapter, effects=lambda: turned)
        resumed.restore(tmp_path / "c.safetensors")
        assert [trainer.step().loss for _ in range(5)] == [resumed.step().loss for _ in range(5)]
        assert resumed._policy_state[EFFECTS] == found["effects"]
