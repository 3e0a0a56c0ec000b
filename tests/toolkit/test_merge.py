"""Out of a run as a PEFT folder: no torch, no rules of PEFT's; what a merge never overwrites."""

import json
import shutil

import msgspec
import numpy as np
import pytest
from rounds_by_hand import job

from fleetune.broker.store.kept_versions import read_version
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.arrays import load_arrays, save_arrays, to_bytes
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Origin
from fleetune.device_runtime.contracts.provenance import read_provenance
from fleetune.device_runtime.errors import ArtifactError, ConfigError, ExportError, StateError
from fleetune.toolkit import origin
from fleetune.toolkit.merge import merge
from fleetune.toolkit.origin import find_model, recorded_name

PREFIX = "base_model.model.bert.encoder.layer.0.attention.self"
CONFIG = {
    "peft_type": "LORA",
    "task_type": "SEQ_CLS",
    "r": 2,
    "target_modules": ["query"],
    "modules_to_save": ["classifier"],
    "base_model_name_or_path": "",
}


def tensors():
    return {
        f"{PREFIX}.query.lora_A.weight": np.ones((2, 4), np.float32),
        f"{PREFIX}.query.lora_B.weight": np.ones((4, 2), np.float32),
        "base_model.model.classifier.weight": np.ones((3, 4), np.float32),
    }


def write(folder, arrays, **changes):
    folder.mkdir(parents=True)
    save_arrays(folder / "adapter_model.safetensors", arrays)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | changes))


@pytest.mark.parametrize("inner", ["adapter", "run/adapter", "."])
def test_the_adapter_of_every_kind_of_run_is_found_and_copied(tmp_path, inner):
    write(tmp_path / "run" / inner, tensors())
    out = merge(tmp_path / "run", out=tmp_path / "new" / "out")
    copied = load_arrays(out / "adapter_model.safetensors")
    assert all(np.array_equal(copied[name], value) for name, value in tensors().items())
    assert json.loads((out / "adapter_config.json").read_text()) == CONFIG


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {f"{PREFIX}.query.lora_A.weight": np.ones((3, 4), np.float32)},
            r"shapes \[3, 4\] and \[4, 2\] do not fit",
        ),
        ({f"{PREFIX}.query.lora_A.weight": np.full((2, 4), np.nan, np.float32)}, "holds NaN"),
        ({f"{PREFIX}.key.lora_B.weight": np.ones((4, 2), np.float32)}, r"key: \.lora_A\.weight without"),
        (
            {"base_model.model.embed.lora_embedding_A": np.ones((2, 9), np.float32)},
            "embed: .lora_embedding_A with",
        ),
        (
            {"base_model.model.classifier.weight": np.full((3, 4), np.inf)},
            "classifier.weight: holds NaN or inf",
        ),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_written(tmp_path, change, words):
    write(tmp_path / "run", tensors() | change)
    with pytest.raises(ArtifactError, match=words):
        merge(tmp_path / "run", out=tmp_path / "new" / "out")
    assert not (tmp_path / "new").exists()


def test_what_peft_writes_is_taken_whatever_its_form(tmp_path):
    odd = {
        f"{PREFIX}.query.lora_B.bias": np.ones(4, np.float32),
        f"{PREFIX}.query.base_layer.bias": np.ones(4, np.float32),
        f"{PREFIX}.query.lora_magnitude_vector": np.ones(4, np.float32),
        "base_model.model.embed.lora_embedding_A": np.ones((2, 9), np.float64),
        "base_model.model.embed.lora_embedding_B": np.ones((4, 2), np.float16),
        "base_model.model.embed.token_adapter.trainable_tokens_delta": np.ones((1, 4), np.float32),
        "base_model.model.conv.lora_A.weight": np.ones((2, 3, 5, 5), np.float32),
        "base_model.model.conv.lora_B.weight": np.ones((4, 2, 1, 1), np.float32),
    }
    write(tmp_path / "run", tensors() | odd, target_modules=".*query", r=77)
    copied = load_arrays(merge(tmp_path / "run", out=tmp_path / "out") / "adapter_model.safetensors")
    assert copied.keys() == tensors().keys() | odd.keys()
    assert {n: a.dtype for n, a in odd.items()} == {n: copied[n].dtype for n in odd}


def test_what_is_no_adapter_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match="no adapter here"):
        merge(tmp_path, out=tmp_path / "out")
    write(tmp_path / "run", tensors(), peft_type="IA3")
    with pytest.raises(ArtifactError, match="expected a LoRA configuration"):
        merge(tmp_path / "run", out=tmp_path / "out")
    (tmp_path / "run" / "adapter_config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: cannot be read"):
        merge(tmp_path / "run", out=tmp_path / "out")


def test_a_truncated_file_is_refused(tmp_path):
    write(tmp_path / "run", tensors())
    path = tmp_path / "run" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(ArtifactError, match="cannot be read as safetensors"):
        merge(tmp_path / "run", out=tmp_path / "out")


def test_what_a_run_wrote_is_compared_with_its_artifact_wherever_it_is_copied(tmp_path, word_artifact):
    artifact = open_artifact(word_artifact)
    arrays = artifact.adapter()
    save_peft(tmp_path / "run" / "adapter", artifact.manifest, arrays)
    out = merge(tmp_path / "run", out=tmp_path / "once")
    again = merge(out, out=tmp_path / "twice")
    assert read_provenance(again) == read_provenance(tmp_path / "run" / "adapter")
    assert read_provenance(again).labels == tuple("abcde")
    name = sorted(arrays)[0]
    save_arrays(again / "adapter_model.safetensors", {n: a for n, a in arrays.items() if n != name})
    with pytest.raises(ArtifactError, match=f"{name}: missing"):
        merge(again, out=tmp_path / "thrice")
    save_arrays(again / "adapter_model.safetensors", arrays | {name: arrays[name][:1]})
    with pytest.raises(ArtifactError, match=f"{name}: expected shape"):
        merge(again, out=tmp_path / "thrice")


def test_what_others_put_beside_an_adapter_comes_along(tmp_path):
    write(tmp_path / "theirs", tensors())
    for name in ("README.md", "tokenizer.json", "special_tokens_map.json", "optimizer.pt"):
        (tmp_path / "theirs" / name).write_text(name)
    out = merge(tmp_path / "theirs", out=tmp_path / "out")
    assert (out / "README.md").read_text() == "README.md"
    assert {p.name for p in out.iterdir()} >= {"tokenizer.json", "special_tokens_map.json"}
    assert not (out / "optimizer.pt").exists()


@pytest.mark.parametrize("where", [".", "run", "run/adapter", "notes", "file"])
def test_nothing_of_the_users_is_written_over(tmp_path, where):
    write(tmp_path / "run" / "adapter", tensors())
    (tmp_path / "run" / "run.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "README.md").write_text("mine")
    (tmp_path / "file").write_text("mine")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    with pytest.raises(ConfigError, match="choose another --out"):
        merge(tmp_path / "run", out=tmp_path / where)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}


def test_an_earlier_merge_is_replaced_unless_something_was_added(tmp_path):
    write(tmp_path / "run", tensors())
    out = merge(tmp_path / "run", out=tmp_path / "out")
    (out / "adapter_model.safetensors").write_bytes(b"old")
    merge(tmp_path / "run", out=out)
    assert load_arrays(out / "adapter_model.safetensors").keys() == tensors().keys()
    (out / "diary.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"diary\.txt"):
        merge(tmp_path / "run", out=out)
    assert (out / "diary.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".*"))


def test_the_adapter_of_another_run_is_no_earlier_merge(tmp_path, word_artifact):
    artifact = open_artifact(word_artifact)
    for run in ("one", "two"):
        save_peft(tmp_path / run / "adapter", artifact.manifest, artifact.adapter())
        (tmp_path / run / "run.json").write_text("{}")
    with pytest.raises(ConfigError, match="is the adapter of a run"):
        merge(tmp_path / "one", out=tmp_path / "two" / "adapter")


@pytest.fixture
def federated(tmp_path, word_artifact):
    """An aggregator's folder after two rounds of more, without an adapter: what a stopped one of 0.1.0 leaves."""
    artifact = open_artifact(word_artifact)
    settings = msgspec.structs.replace(job(), artifact=artifact.digest)
    with Ledger(tmp_path / "run", settings) as ledger:
        for version in range(3):
            moved = {n: a + np.float32(version) for n, a in artifact.adapter().items()}
            ledger.add_version(version, to_bytes(moved), round_number=version)
    return tmp_path / "run"


def test_a_version_of_a_stopped_federation_comes_out(tmp_path, federated, word_artifact):
    artifact = open_artifact(word_artifact)
    for version, wanted in ((1, 1), (None, 2)):
        out = merge(federated, out=tmp_path / f"v{version}", version=version, artifact=word_artifact)
        found = load_arrays(out / "adapter_model.safetensors")
        assert all(np.array_equal(found[n], a + np.float32(wanted)) for n, a in artifact.adapter().items())
        assert read_provenance(out).labels == tuple("abcde")
    other = shutil.copytree(word_artifact, tmp_path / "other")
    (other / "manifest.json").write_bytes((other / "manifest.json").read_bytes() + b"\n")
    with pytest.raises(ConfigError, match="not the artifact of the job"):
        merge(federated, out=tmp_path / "out", artifact=other)
    with pytest.raises(ConfigError, match="has version 2 and no adapter/ yet; give --artifact"):
        merge(federated, out=tmp_path / "out")


def test_a_version_beside_an_adapter_needs_no_artifact(tmp_path, federated, word_artifact):
    artifact = open_artifact(word_artifact)
    save_peft(federated / "adapter", artifact.manifest, artifact.adapter())
    out = merge(federated, out=tmp_path / "out", version=2)
    name = artifact.manifest.trainable[0].name
    assert np.array_equal(load_arrays(out / "adapter_model.safetensors")[name], artifact.adapter()[name] + 2)
    with pytest.raises(ConfigError, match="no version 7; there are 0 to 2"):
        merge(federated, out=tmp_path / "seven", version=7)
    with pytest.raises(ConfigError, match="choose another --out"):
        merge(federated, out=federated / "adapter", version=1)


def test_a_run_without_versions_and_a_damaged_version_are_refused(tmp_path, federated, word_artifact):
    write(tmp_path / "alone" / "adapter", tensors())
    with pytest.raises(ConfigError, match="no job of an aggregator here"):
        merge(tmp_path / "alone", out=tmp_path / "out", version=1)
    (federated / "versions" / "00001.safetensors").write_bytes(b"other")
    with pytest.raises(StateError, match="SHA-256"):
        merge(federated, out=tmp_path / "out", version=1, artifact=word_artifact)
    assert read_version(federated).version == 2
    assert not (tmp_path / "out").exists()


def test_a_folder_is_recorded_so_that_it_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "minilm").mkdir()
    (tmp_path / "org" / "name").mkdir(parents=True)
    assert [recorded_name(s) for s in ("minilm", "org/name", "./minilm", "../x", "gpt2", "a/b")] == [
        "./minilm",
        "./org/name",
        "./minilm",
        "../x",
        "gpt2",
        "a/b",
    ]
    assert recorded_name(str(tmp_path / "minilm")) == str(tmp_path / "minilm")


@pytest.mark.parametrize(
    ("recorded", "kind", "ours"),
    [
        ("./minilm", "folder", True),
        ("/gone/minilm", "", False),
        ("minilm", "folder", True),
        ("models/minilm", "folder", True),
    ],
)
def test_a_folder_that_is_gone_is_never_looked_for_on_the_hub(monkeypatch, recorded, kind, ours):
    monkeypatch.setattr(origin, "_is_cached", lambda name: True)
    with pytest.raises(ExportError, match=f"{recorded}: the model was this folder, .*give --model"):
        find_model(None, recorded, Origin(kind), ours=ours)


def test_the_hub_is_asked_for_what_is_known_to_be_there(monkeypatch):
    monkeypatch.setattr(origin, "_is_cached", lambda name: False)
    for recorded, ours in (("minilm", False), ("models/minilm", True)):
        with pytest.raises(
            ExportError, match=f"{recorded}: .*nothing says that it is a hub id; give --model"
        ):
            find_model(None, recorded, Origin(), ours=ours)
    monkeypatch.setattr(origin, "_is_cached", lambda name: True)
    assert find_model(None, "gpt2", Origin(), ours=False) == ("gpt2", False)
    assert find_model(None, "gpt2", Origin("hub"), ours=True) == ("gpt2", True)
    assert find_model(None, "org/name", Origin(), ours=False) == ("org/name", True)
    assert find_model("org/name", "", Origin("folder"), ours=True) == ("org/name", True)
    with pytest.raises(ConfigError, match="give --model"):
        find_model(None, "", Origin(), ours=True)
