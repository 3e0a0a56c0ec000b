"""``export`` as an ML engineer meets it: a folder, a hub id that is none, adapters, labels, and everything that can be wrong."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import PeftModel
from pretrained import MINILM
from tiny_tokenizers import NUM_TOKENS, byte_tokenizer, word_tokenizer

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ConfigError, ExportError
from fleetune.toolkit.configuration import resolve
from fleetune.toolkit.export import export, read_labels

TASK = "sequence-classification"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT of two layers with random weights and MiniLM's tokenizer."""
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiny") / "tiny-bert"
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=64, num_labels=3, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def artifact(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    lines: list[str] = []
    report = export(
        tiny, task=TASK, labels=["a", "b", "c"], out=folder, lora_r=4, lora_alpha=12, on_progress=lines.append
    )
    assert (report.name, report.num_layers, report.num_kinds) == ("tiny-bert", 2, 1)
    assert len(lines) >= 4
    return folder


def test_the_manifest_says_what_a_device_needs(artifact: Path) -> None:
    manifest = open_artifact(artifact).manifest
    assert manifest.labels == ("a", "b", "c")
    assert [row.name for row in manifest.inputs] == [
        "input_ids",
        "token_type_ids",
        "attention_mask",
        "labels",
    ]
    assert manifest.tokenizer is not None
    assert manifest.tokenizer.max_length == 64
    assert manifest.peft["lora_alpha"] == 12
    names = {t.name for t in manifest.trainable}
    assert "base_model.model.bert.encoder.layer.1.attention.self.query.lora_A.weight" in names
    assert "base_model.model.classifier.bias" in names


def test_another_process_exports_the_same_artifact(tiny: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "labels").write_text("a\nb\nc\n")
    words = [
        "--labels",
        tmp_path / "labels",
        "--out",
        tmp_path / "artifact",
        "--lora-r",
        4,
        "--lora-alpha",
        12,
    ]
    command = [Path(sys.executable).with_name("fleetune"), "export", tiny, "--task", TASK, *words]
    subprocess.run([str(word) for word in command], check=True, env={**os.environ, "PYTHONHASHSEED": "1"})
    manifests = [(folder / "manifest.json").read_bytes() for folder in (artifact, tmp_path / "artifact")]
    assert manifests[0] == manifests[1]


def test_selfcheck(artifact: Path) -> None:
    assert selfcheck(artifact).ok


def test_blocks_lie_on_pages_of_their_own_and_tensors_on_cache_lines(artifact: Path) -> None:
    rows = [t for t in open_artifact(artifact).manifest.tensors if not t.trainable]
    assert all(t.offset % 64 == 0 for t in rows)
    for layer in range(2):
        assert min(t.offset for t in rows if t.layer == layer) % 4096 == 0


def test_no_tensor_data_inside_the_graphs(artifact: Path) -> None:
    assert sum(path.stat().st_size for path in (artifact / "graphs").iterdir()) < 200_000


def test_an_existing_adapter_is_the_start(tiny: Path, artifact: Path, tmp_path: Path) -> None:
    from fleetune.device_runtime.contracts.adapters import save_peft

    opened = open_artifact(artifact)
    moved = {name: value + np.float32(0.01) for name, value in opened.adapter().items()}
    save_peft(tmp_path / "adapter", opened.manifest, moved)
    export(tiny, task=TASK, num_labels=3, out=tmp_path / "again", adapter=tmp_path / "adapter")
    again = open_artifact(tmp_path / "again")
    assert again.manifest.peft["r"] == 4
    assert all(np.array_equal(value, moved[name]) for name, value in again.adapter().items())
    ids = np.arange(100, 112).reshape(2, 6)
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=3)
    model = PeftModel.from_pretrained(base, str(tmp_path / "adapter")).eval()
    with open_engine(again) as stack, torch.no_grad():
        expected = model(**{n: torch.from_numpy(a) for n, a in batch.items()}).logits.numpy()
        np.testing.assert_allclose(stack.predict(batch, again.adapter()), expected, atol=1e-5)


@pytest.mark.parametrize("source", ["/no/such/model", "./no-such-model", "a/b/c"])
def test_a_folder_that_is_not_there(source: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="no such folder; MODEL is a local folder or a hub id"):
        export(source, task=TASK, num_labels=2, out=tmp_path / "out")


def test_a_folder_that_holds_no_model(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"no model here \(no config\.json\)"):
        export(tmp_path, task=TASK, num_labels=2, out=tmp_path / "out")


def test_a_config_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="not a model for sequence-classification"):
        export(tmp_path, task=TASK, num_labels=2, out=tmp_path / "out")


def test_weights_that_are_cut(tiny: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in tiny.iterdir():
        (broken / path.name).write_bytes(path.read_bytes()[: 1000 if path.suffix == ".safetensors" else None])
    with pytest.raises(ExportError, match="not a model for"):
        export(broken, task=TASK, num_labels=2, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_unknown_target_module_lists_what_there_is(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ExportError, match=r"target module 'q_proj': no linear module of this model; .*key, query, value"
    ):
        export(tiny, task=TASK, num_labels=3, out=tmp_path / "out", target_modules=["q_proj"])


def test_an_adapter_of_another_model(tiny: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "target_modules": ["nothing"]})
    )
    with pytest.raises(ExportError, match="an adapter without weights"):
        export(tiny, task=TASK, num_labels=3, out=tmp_path / "out", adapter=tmp_path)


def test_a_folder_in_the_way_is_not_touched(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(ExportError, match="exists and is not an artifact"):
        export(tiny, task=TASK, num_labels=3, out=tmp_path)
    assert (tmp_path / "precious").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "poetry"}, "no task 'poetry'; have: audio-classification, causal-lm, image-classification"),
        ({"backend": "tensorrt"}, "no backend 'tensorrt'; have:"),
        ({"base_dtype": "int3"}, "--base-dtype int3"),
        ({"lora_r": 0}, "--lora-r 0"),
        ({"num_labels": None}, "give --num-labels N or --labels FILE"),
    ],
)
def test_wrong_settings(tiny: Path, tmp_path: Path, changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        export(tiny, out=tmp_path / "out", **{"task": TASK, "num_labels": 3, **changes})  # type: ignore[arg-type]


def test_labels_from_files(tmp_path: Path) -> None:
    (tmp_path / "lines").write_text("yes\nno\n\n")
    (tmp_path / "list.json").write_text('["yes", "no"]')
    assert read_labels(tmp_path / "lines", None) == read_labels(tmp_path / "list.json", 2) == ["yes", "no"]
    assert read_labels(None, 2) == ["label_0", "label_1"]


@pytest.mark.parametrize(
    ("labels", "count", "said"),
    [
        (["a", "a"], None, "1 of them distinct"),
        (["a"], None, "1 label: expected two or more"),
        (["a", "b"], 3, "3 classes, but 2 labels are named: a, b"),
    ],
)
def test_labels_that_cannot_be(labels: list[str], count: int | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_labels(labels, count)


WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}


def tagger_of_few_positions(folder: Path) -> Any:
    """A RoBERTa for words: 20 positions of which padding takes two, a byte-level BPE that cuts at the left."""
    tokenizer = byte_tokenizer(truncation_side="left", pad_token="!", model_max_length=20)
    tokenizer.add_tokens(["<device>"])
    tokenizer.save_pretrained(folder)
    config = transformers.RobertaConfig(
        vocab_size=len(tokenizer) - 1, max_position_embeddings=20, pad_token_id=1, num_labels=3, **WIDTHS
    )
    torch.manual_seed(0)
    transformers.RobertaForTokenClassification(config).save_pretrained(folder)
    return tokenizer


def test_the_manifest_holds_what_was_decided_and_the_report_why(tmp_path: Path) -> None:
    tokenizer, notes = tagger_of_few_positions(tmp_path / "model"), []
    report = export(
        tmp_path / "model",
        task="token-classification",
        num_labels=3,
        out=tmp_path / "artifact",
        max_length=19,
        target_modules=r".*\.(query|value)",
        on_note=notes.append,
    )
    assert [note.partition(":")[0] for note in notes] == [
        "padding",
        "vocabulary",
        "words",
        "length",
        "length",
    ]
    assert report.notes == notes
    manifest = open_artifact(tmp_path / "artifact").manifest
    ids = next(row for row in manifest.inputs if row.name == "input_ids")
    assert (ids.pad, ids.below) == (1, len(tokenizer) - 1)
    assert manifest.bounds == {"seq": 18}
    assert manifest.tokenizer is not None
    assert (manifest.tokenizer.pad_id, manifest.tokenizer.max_length) == (1, 18)
    assert manifest.tokenizer.truncation_side == "left"
    assert manifest.peft["target_modules"] == r".*\.(query|value)"
    assert selfcheck(tmp_path / "artifact").ok


@pytest.mark.slow
def test_a_decoders_classes_do_not_depend_on_the_padding(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(tmp_path / "model")
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=16, n_layer=2, n_head=2, n_positions=16, num_labels=3
    )
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    torch.manual_seed(0)
    plain = transformers.GPT2ForSequenceClassification(config).eval()
    plain.save_pretrained(tmp_path / "model")
    export(tmp_path / "model", task=TASK, num_labels=3, out=tmp_path / "artifact", on_note=lambda _: None)
    artifact = open_artifact(tmp_path / "artifact")
    pad = {row.name: row.pad for row in artifact.manifest.inputs}["input_ids"]
    rows = [[7, 9, 11], [5], list(range(20, 36))]
    batch = {name: np.zeros((3, 16), np.int64) for name in ("input_ids", "attention_mask", "labels")}
    batch["labels"] = np.arange(3)
    for i, row in enumerate(rows):
        batch["input_ids"][i] = np.pad(row, (0, 16 - len(row)), constant_values=int(pad))
        batch["attention_mask"][i, : len(row)] = 1
    with open_engine(artifact) as stack, torch.no_grad():
        step = stack.step(batch, dropping(2, ()), artifact.adapter(), keep_logits=True)
        alone = [plain(input_ids=torch.tensor([row])).logits[0].numpy() for row in rows]
    np.testing.assert_allclose(step.logits, alone, atol=1e-5)


def test_an_encoder_is_no_language_model(tiny: Path, tmp_path: Path) -> None:
    source = tmp_path / "bert"
    transformers.BertLMHeadModel(transformers.BertConfig(vocab_size=40, **WIDTHS)).save_pretrained(source)
    with pytest.raises(ExportError, match="BertLMHeadModel is an encoder: each token sees those after it"):
        export(source, task="causal-lm", out=tmp_path / "out", on_note=lambda _: None)
    assert not (tmp_path / "out").exists()


def test_a_pooler_that_the_checkpoint_lacks_is_in_the_adapter(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=NUM_TOKENS, max_position_embeddings=16, **WIDTHS)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path / "model")
    word_tokenizer().save_pretrained(tmp_path / "model")
    notes: list[str] = []
    export(tmp_path / "model", task=TASK, labels=["a", "b"], out=tmp_path / "artifact", on_note=notes.append)
    assert "drawn from the seed: bert.pooler.dense.weight" in notes[0]
    names = {t.name for t in open_artifact(tmp_path / "artifact").manifest.trainable}
    assert {f"base_model.model.{n}.weight" for n in ("bert.pooler.dense", "classifier")} <= names
    assert selfcheck(tmp_path / "artifact").ok


@pytest.mark.parametrize(
    "arguments",
    [
        "'/no/such/model', task='sequence-classification', num_labels=2",
        "'.', task='sequence-classification', num_labels=2",
        "MODEL, task='sequence-classification', labels='/no/such/labels'",
        "MODEL, task='sequence-classification', labels=['a', 'a']",
        "MODEL, task='causal-lm', lora_r=0",
        "MODEL, task='causal-lm', max_length=0",
        "MODEL, task='causal-lm', lora_alpha=0",
        "MODEL, task='causal-lm', adapter='/no/such/adapter'",
        "MODEL, task='causal-lm', adapter=MODEL",
    ],
)
def test_a_slip_is_told_before_torch_is_loaded(arguments: str, tiny: Path, tmp_path: Path) -> None:
    code = (
        "import sys\nfrom fleetune import export\nfrom fleetune.device_runtime.errors import FleetuneError\n"
        f"try:\n    export({arguments.replace('MODEL', repr(str(tiny)))}, out='out')\n"
        "except FleetuneError:\n    print({'torch', 'transformers'} & sys.modules.keys())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path
    )
    assert done.stdout == "set()\n"


@pytest.mark.parametrize(
    ("toml", "targets"),
    [
        ("'all-linear'", "all-linear"),
        ("'.*query'", ".*query"),
        ('["query", "value"]', ["query", "value"]),
    ],
)
def test_targets_in_a_file(toml: str, targets: object, tmp_path: Path) -> None:
    (tmp_path / "export.toml").write_text(f"[export]\ntarget-modules = {toml}\n")
    flags = {"target_modules": None, "task": TASK, "out": tmp_path}
    made = resolve(export, flags | {"model": "m"}, config=tmp_path / "export.toml", table="export")
    assert made["target_modules"] == targets
