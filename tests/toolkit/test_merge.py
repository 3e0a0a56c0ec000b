import json
import shutil

import numpy as np
import pytest

from fleetune.device_runtime.arrays import load_arrays, save_arrays
from fleetune.device_runtime.errors import ArtifactError, ExportError
from fleetune.toolkit.merge import _num_classes, merge

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
            r"shape \[3, 4\] does not fit rank 2",
        ),
        ({f"{PREFIX}.query.lora_A.weight": np.full((2, 4), np.nan, np.float32)}, "holds NaN"),
        (
            {f"{PREFIX}.key.lora_A.weight": np.ones((2, 4), np.float32)},
            r"key is not among target_modules.*without lora_B",
        ),
        ({"base_model.model.pooler.weight": np.ones(3, np.float32)}, "neither LoRA nor in modules_to_save"),
    ],
)
def test_a_damaged_adapter_is_refused_and_nothing_written(tmp_path, change, words):
    write(tmp_path / "run", tensors() | change)
    with pytest.raises(ArtifactError, match=f"(?s){words}"):
        merge(tmp_path / "run", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


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


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A tiny BERT in a folder, an adapter of it that says something, and what the two say together."""
    import peft
    import torch
    import transformers

    folder = tmp_path_factory.mktemp("tuned")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=20, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "model")
    base = transformers.AutoModelForSequenceClassification.from_pretrained(folder / "model", num_labels=3)
    model = peft.get_peft_model(
        base, peft.LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"])
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    model.save_pretrained(folder / "adapter")
    ids = torch.arange(5, 15)[None]
    return folder, ids, model.eval()(ids).logits


def test_the_merged_model_says_what_model_and_adapter_said(tuned, tmp_path):
    import torch
    import transformers

    folder, ids, expected = tuned
    out = merge(folder, out=tmp_path / "merged", full=True, labels=["a", "b", "c"])
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(out).eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-5)
    assert merged.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert {path.stat().st_mode & 0o044 for path in out.iterdir()} == {0o044}, "others may read it"


@pytest.mark.parametrize(
    ("run", "names"), [({"labels": ["no", "yes", "maybe"]}, ["no", "yes", "maybe"]), ({}, None), (None, None)]
)
def test_classes_have_the_names_of_the_run_or_numbers(tuned, tmp_path, run, names):
    import transformers

    folder = tmp_path / "run"
    shutil.copytree(tuned[0] / "adapter", folder / "adapter")
    if run is not None:
        (folder / "run.json").write_text(json.dumps({"artifact": "a", **run}))
    merge(folder, out=tmp_path / "merged", full=True)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "merged")
    assert config.id2label == dict(enumerate(names or ["label_0", "label_1", "label_2"]))


def test_a_run_about_other_classes_is_refused(tuned, tmp_path):
    shutil.copytree(tuned[0] / "adapter", tmp_path / "run" / "adapter")
    (tmp_path / "run" / "run.json").write_text(json.dumps({"labels": ["a", "b"]}))
    with pytest.raises(ArtifactError, match="a head of 3 classes, but its run was about 2"):
        merge(tmp_path / "run", out=tmp_path / "merged", full=True)


@pytest.mark.parametrize("head", ["classifier", "classifier.out_proj"])
def test_classes_are_counted_at_the_last_linear_however_narrow_the_model(tmp_path, head):
    """Four wide, nine classes: the smallest tensor that is saved whole has four rows."""
    arrays = {
        "base_model.model.classifier.dense.weight": np.ones((4, 4), np.float32),
        f"base_model.model.{head}.weight": np.ones((9, 4), np.float32),
    }
    assert _num_classes(tmp_path, CONFIG, arrays) == 9


def test_a_head_of_unknown_names_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"looked for base_model\.model\.classifier\.weight"):
        _num_classes(tmp_path, CONFIG, {"base_model.model.classifier.bias": np.ones(3, np.float32)})


def test_a_model_that_is_gone_is_named(tuned, tmp_path):
    with pytest.raises(ExportError, match="nowhere"):
        merge(tuned[0], out=tmp_path / "merged", full=True, model=tmp_path / "nowhere")
