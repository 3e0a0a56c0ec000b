"""Merged models, against plain transformers and PEFT: every form of LoRA, tied and half-precision models, what is refused."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import tokenizers
import torch
import transformers
from resident import resident_kb
from safetensors.torch import load_file, save_file
from tiny import noisy_adapter
from tiny_tokenizers import word_tokenizer
from torch import Tensor

from fleetune.device_runtime.contracts.adapters import read_peft, save_peft, write_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Origin
from fleetune.device_runtime.contracts.provenance import (
    Provenance,
    adapter_card,
    read_provenance,
    write_provenance,
)
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ArtifactError, ConfigError, ExportError
from fleetune.toolkit import exact_merge, merged_model
from fleetune.toolkit.export import export
from fleetune.toolkit.merge import merge
from fleetune.toolkit.origin import frozen_digest, parameter_digests
from fleetune.toolkit.programs import describe

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
SIZES |= {"vocab_size": 50, "max_position_embeddings": 64}
IDS = torch.tensor([[5, 9, 14, 30, 7, 3]])
NAMES = ["no", "yes", "maybe"]


def save(folder: Path, auto: str, config: Any, dtype: torch.dtype = torch.float32) -> Path:
    torch.manual_seed(0)
    model = getattr(transformers, auto).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.15)
    model.to(dtype).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = transformers.BertConfig(num_labels=3, **SIZES)
    return save(tmp_path_factory.mktemp("bert"), "AutoModelForSequenceClassification", config)


def llama(folder: Path, dtype: torch.dtype = torch.float32, **more: Any) -> Path:
    config = transformers.LlamaConfig(num_key_value_heads=2, **(SIZES | more))
    return save(folder, "AutoModelForCausalLM", config, dtype)


def adapt(model: Path, folder: Path, auto: str, dtype: torch.dtype | None = None, **settings: Any) -> Tensor:
    """Save an adapter of which nothing is zero; return what model and adapter say, in float32."""
    torch.manual_seed(1)
    base = getattr(transformers, auto).from_pretrained(model, dtype=torch.float32)
    learning = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=8, **settings))
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if parameter.requires_grad else 0)
    learning.save_pretrained(folder)
    weights = folder / "adapter_model.safetensors"
    if dtype:
        save_file({n: a.to(dtype) for n, a in load_file(weights).items()}, weights, metadata={"format": "pt"})
    return says(getattr(transformers, auto).from_pretrained(model, dtype=torch.float32), folder)


@torch.no_grad()
def says(model: Any, adapter: Path | None = None) -> Tensor:
    whole = peft.PeftModel.from_pretrained(model, adapter) if adapter else model
    return whole.eval()(input_ids=IDS).logits


def reload(folder: Path, auto: str) -> Any:
    return getattr(transformers, auto).from_pretrained(folder)


CLASSIFIER, WRITER = "AutoModelForSequenceClassification", "AutoModelForCausalLM"
TAGGER, VIEWER = "AutoModelForTokenClassification", "AutoModelForImageClassification"
FORMS = {
    "plain": {"target_modules": ["query", "value"]},
    "lora_bias": {"target_modules": ["query"], "lora_bias": True},
    "lora_only": {"target_modules": ["query"], "bias": "lora_only"},
    "all biases": {"target_modules": ["query"], "bias": "all"},
    "dora": {"target_modules": ["query"], "use_dora": True},
    "rslora": {"target_modules": ["query"], "use_rslora": True},
    "patterns": {
        "target_modules": ["query", "key"],
        "rank_pattern": {"layer.1.attention.self.query": 2, "^bert.encoder.layer.0.*key": 3},
        "alpha_pattern": {"key": 5},
    },
    "whole modules": {"target_modules": ["query"], "modules_to_save": ["classifier", "pooler"]},
    "some layers": {"target_modules": ["query"], "layers_to_transform": [1]},
    "but one": {"target_modules": ["query", "value"], "exclude_modules": r".*layer\.0.*value"},
    "expression": {"target_modules": r".*layer\.1\..*(query|dense)"},
    "all-linear": {"target_modules": "all-linear"},
    "embedding": {"target_modules": ["word_embeddings", "query"]},
    "tokens": {"target_modules": ["query"], "trainable_token_indices": {"word_embeddings": [5, 44]}},
    "fp64": {"target_modules": ["query"], "dtype": torch.float64},
    "bf16": {"target_modules": ["query"], "dtype": torch.bfloat16},
}


@pytest.mark.parametrize("task_type", ["SEQ_CLS", None])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_lora_comes_out(bert: Path, tmp_path: Path, form: str, task_type: str | None) -> None:
    settings = {"modules_to_save": ["classifier"], "task_type": task_type} | FORMS[form]
    expected = adapt(bert, tmp_path / "adapter", CLASSIFIER, **settings)
    again = merge(tmp_path / "adapter", out=tmp_path / "again")
    merged = merge(again, out=tmp_path / "merged", full=True)
    torch.testing.assert_close(says(reload(bert, CLASSIFIER), again), expected, atol=0, rtol=0)
    torch.testing.assert_close(says(reload(merged, CLASSIFIER)), expected, atol=1e-5, rtol=1e-4)


def test_merging_is_w_plus_scale_ba_and_nothing_else(bert: Path, tmp_path: Path) -> None:
    adapt(
        bert, tmp_path / "adapter", CLASSIFIER, task_type="SEQ_CLS", target_modules=["query"], use_rslora=True
    )
    merged = load_file(merge(tmp_path / "adapter", out=tmp_path / "out", full=True) / "model.safetensors")
    given, adapter = (
        load_file(bert / "model.safetensors"),
        load_file(tmp_path / "adapter/adapter_model.safetensors"),
    )
    assert merged.keys() == given.keys()
    for name, weight in given.items():
        side = f"base_model.model.{name.removesuffix('.weight')}.lora_"
        if f"{side}A.weight" in adapter:
            moved = weight + 8 / 4**0.5 * adapter[f"{side}B.weight"] @ adapter[f"{side}A.weight"]
            torch.testing.assert_close(merged[name], moved, atol=1e-6, rtol=1e-6)
            assert not merged[name].equal(weight)
        else:
            assert merged[name].equal(adapter.get(f"base_model.model.{name}", weight)), name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_keeps_the_dtype_of_its_checkpoint(tmp_path: Path, dtype: torch.dtype) -> None:
    model = llama(tmp_path / "model", dtype)
    tensors = load_file(model / "model.safetensors")
    kept = "model.norm.weight"  # one that its checkpoint has in float32
    save_file(tensors | {kept: tensors[kept].float() * 1.0001}, model / "model.safetensors", {"format": "pt"})
    adapt(model, tmp_path / "adapter", WRITER, task_type="CAUSAL_LM", target_modules=["q_proj"])
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
    given, merged = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert {n: t.dtype for n, t in merged.items()} == {n: t.dtype for n, t in given.items()}
    assert {n for n in given if not merged[n].equal(given[n])} == {n for n in given if "q_proj" in n}
    assert transformers.AutoConfig.from_pretrained(out).dtype == dtype
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.self_attn.q_proj"
    b, a = (adapter[f"base_model.model.{name}.lora_{side}.weight"] for side in "BA")
    assert merged[f"{name}.weight"].equal((given[f"{name}.weight"].float() + 2 * b @ a).to(dtype))


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says which memory is a file's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_no_adapter_changes_is_in_memory_no_longer_than_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """A table of 800 kB in float32, mapped from the checkpoint or from what it was widened into."""
    model = llama(tmp_path / "model", dtype, vocab_size=12_500)
    adapt(model, tmp_path / "adapter", WRITER, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"])
    resident = []

    def merged_exactly(learning: Any, tell: Any) -> Any:
        merged = merge_exactly(learning, tell)
        resident.append(resident_kb(merged.get_input_embeddings().weight))
        return merged

    merge_exactly = exact_merge.merge_exactly
    monkeypatch.setattr(merged_model, "merge_exactly", merged_exactly)
    merge(tmp_path / "adapter", out=tmp_path / "merged", full=True)
    assert len(resident) == 1
    assert resident[0] < 100


def test_what_outgrows_half_precision_is_refused(tmp_path: Path) -> None:
    model = llama(tmp_path / "model", torch.float16)
    adapt(model, tmp_path / "adapter", WRITER, task_type="CAUSAL_LM", target_modules=["v_proj"])
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({n: a * 2000 for n, a in load_file(weights).items()}, weights, {"format": "pt"})
    with pytest.raises(ExportError, match=r"v_proj\.weight: merged, it holds values beyond torch\.float16"):
        merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
    assert not (tmp_path / "out").exists()


TIED = {
    "lm_head": {"target_modules": ["lm_head", "q_proj"]},
    "embedding": {"target_modules": ["embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "whole": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [5, 9]},
}


@pytest.mark.parametrize("form", TIED)
def test_tied_embeddings_are_merged_as_they_answered(tmp_path: Path, form: str) -> None:
    model = llama(tmp_path / "model", tie_word_embeddings=True)
    expected = adapt(model, tmp_path / "adapter", WRITER, task_type="CAUSAL_LM", **TIED[form])
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
    torch.testing.assert_close(says(reload(out, WRITER)), expected, atol=1e-5, rtol=1e-4)


def test_a_tied_gpt2_is_untied_and_told(tmp_path: Path) -> None:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=50, n_positions=20)
    model = save(tmp_path / "model", WRITER, config)
    settings = {"target_modules": ["c_attn", "lm_head"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}
    expected = adapt(model, tmp_path / "adapter", WRITER, **settings)
    said: list[str] = []
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True, on_progress=said.append)
    torch.testing.assert_close(says(reload(out, WRITER)), expected, atol=1e-5, rtol=1e-4)
    given, merged = load_file(model / "model.safetensors"), load_file(out / "model.safetensors")
    assert merged["transformer.wte.weight"].equal(given["transformer.wte.weight"])
    assert any("lm_head shared its weights" in line for line in said)
    assert said[0].startswith("loading ")


def test_repeated_layers_are_merged_each_on_its_own(tmp_path: Path) -> None:
    model = llama(tmp_path / "model")
    settings = {"target_modules": ["q_proj"], "layer_replication": [[0, 2], [1, 2]], "task_type": "CAUSAL_LM"}
    expected = adapt(model, tmp_path / "adapter", WRITER, **settings)
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
    torch.testing.assert_close(says(reload(out, WRITER)), expected, atol=1e-5, rtol=1e-4)


def test_a_merge_that_changes_the_answers_is_refused(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapt(bert, tmp_path / "adapter", CLASSIFIER, task_type="SEQ_CLS", target_modules=["query"])
    scaled = peft.tuners.lora.Linear.get_delta_weight
    monkeypatch.setattr(
        peft.tuners.lora.Linear, "get_delta_weight", lambda self, name: 1.01 * scaled(self, name)
    )
    with pytest.raises(ExportError, match=r"does not answer .*layer\.0\.attention\.self\.query by"):
        merge(tmp_path / "adapter", out=tmp_path / "new" / "out", full=True)
    assert not (tmp_path / "new").exists()


def test_a_merge_that_changes_anything_else_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tied head, were it not untied: the embedding changes with it, though no adapter is on it."""
    model = llama(tmp_path / "model", tie_word_embeddings=True)
    adapt(model, tmp_path / "adapter", WRITER, task_type="CAUSAL_LM", target_modules=["lm_head"])
    monkeypatch.setattr(exact_merge, "_give_own_weights", lambda learning, say: None)
    with pytest.raises(ExportError, match=r"changes what has no adapter: model\.embed_tokens\.weight"):
        merge(tmp_path / "adapter", out=tmp_path / "out", full=True)


@pytest.fixture(scope="module")
def tuned(bert: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Copies an adapter of three classes into a folder, with a run.json and what fleetune knows of it."""
    made = tmp_path_factory.mktemp("tuned")
    adapt(bert, made, CLASSIFIER, task_type="SEQ_CLS", target_modules=["query"])

    def copy(run: Path, *, known: Provenance | None = None, **run_file: Any) -> Path:
        shutil.copytree(made, run / "adapter")
        if known:
            write_provenance(run / "adapter", known, card="")
        if run_file:
            (run / "run.json").write_text(json.dumps(run_file))
        return run

    return copy


def test_classes_have_the_names_of_the_run_or_the_model(tuned: Callable[..., Path], tmp_path: Path) -> None:
    runs = [
        (tuned(tmp_path / "a", labels=NAMES), None, NAMES),
        (tuned(tmp_path / "b", known=Provenance(labels=tuple(NAMES))), None, NAMES),
        (tuned(tmp_path / "c", labels=NAMES), ["x", "y", "z"], ["x", "y", "z"]),
        (tuned(tmp_path / "d"), None, ["LABEL_0", "LABEL_1", "LABEL_2"]),
    ]
    for run, given, names in runs:
        out = merge(run, out=run / "merged", full=True, labels=given)
        config = transformers.AutoConfig.from_pretrained(out)
        assert config.id2label == dict(enumerate(names))
        assert config.label2id == {name: i for i, name in enumerate(names)}
        assert list(read_provenance(out).labels) == names
    with pytest.raises(ArtifactError, match="a head of 3 classes, but its run was about 2"):
        merge(tuned(tmp_path / "e", labels=["a", "b"]), out=tmp_path / "out", full=True)


def test_a_merged_model_of_ours_answers_with_one_class(
    bert: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    """The checkpoint's head was for several classes at once: a pipeline would give each a probability of its own."""
    model = shutil.copytree(bert, tmp_path / "model")
    config = json.loads((model / "config.json").read_text()) | {"problem_type": "multi_label_classification"}
    (model / "config.json").write_text(json.dumps(config))
    ours = Provenance(task="sequence-classification", labels=tuple(NAMES))
    for known, problem in ((ours, None), (None, "multi_label_classification")):
        run = tuned(tmp_path / str(problem), known=known)
        out = merge(run, out=run / "merged", full=True, model=model)
        assert transformers.AutoConfig.from_pretrained(out).problem_type == problem


def test_what_cannot_be_read_beside_the_model_is_told(
    bert: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    model = shutil.copytree(bert, tmp_path / "model")
    word_tokenizer().save_pretrained(model)
    (model / "tokenizer.json").write_text("{")
    (model / "preprocessor_config.json").write_text("{")
    said: list[str] = []
    out = merge(
        tuned(tmp_path / "run"), out=tmp_path / "out", full=True, model=model, on_progress=said.append
    )
    notes = [line for line in said if line.startswith("note: ")]
    assert [line.partition(":")[2].partition(", so not beside")[0] for line in notes] == [
        " tokenizer.json, tokenizer_config.json: not read as AutoTokenizer",
        " preprocessor_config.json: not read as AutoImageProcessor",
    ]
    assert not (out / "tokenizer.json").exists()


def test_classes_are_counted_in_the_adapter_where_the_checkpoint_has_others(tmp_path: Path) -> None:
    """Four wide, nine classes, a head of two linears: the smallest tensor that is saved whole has four rows."""
    config = transformers.RobertaConfig(**SIZES | {"hidden_size": 4, "pad_token_id": 1})
    model = save(tmp_path / "model", CLASSIFIER, config)
    torch.manual_seed(2)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=9, ignore_mismatched_sizes=True
    )
    learning = peft.get_peft_model(base, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    learning.save_pretrained(tmp_path / "adapter")
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
    merged = reload(out, CLASSIFIER)
    assert merged.config.id2label[8] == "label_8"
    torch.testing.assert_close(says(merged), says(learning), atol=1e-6, rtol=1e-5)


def test_a_merged_decoder_pads_as_the_artifact_did(tmp_path: Path) -> None:
    """A configuration whose padding is no token: an export takes the tokenizer's, and a row padded by it answers as alone."""
    config = transformers.LlamaConfig(num_key_value_heads=2, num_labels=3, **SIZES)
    model = save(tmp_path / "model", CLASSIFIER, config)
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pad_token_id": -1}))
    word_tokenizer().save_pretrained(model)
    adapt(model, tmp_path / "adapter", CLASSIFIER, task_type="SEQ_CLS", target_modules=["q_proj"])
    said: list[str] = []
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True, on_progress=said.append)
    merged = reload(out, CLASSIFIER)
    assert "note: padding: token 0, the tokenizer's; the model's is -1" in said
    assert merged.config.pad_token_id == 0
    rows = torch.nn.functional.pad(IDS, (0, 3)), torch.tensor([[1] * 6 + [0] * 3])
    with torch.no_grad():
        padded = merged(input_ids=rows[0], attention_mask=rows[1]).logits
    torch.testing.assert_close(padded, says(merged), atol=1e-5, rtol=1e-4)


def test_a_model_without_task_is_asked_for_one(bert: Path, tmp_path: Path) -> None:
    expected = adapt(
        bert, tmp_path / "adapter", CLASSIFIER, target_modules=["query"], modules_to_save=["classifier"]
    )
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text()) | {"auto_mapping": None}
    path.write_text(json.dumps(config))
    out = merge(tmp_path / "adapter", out=tmp_path / "by-architecture", full=True)
    torch.testing.assert_close(says(reload(out, CLASSIFIER)), expected, atol=1e-5, rtol=1e-4)
    bare = shutil.copytree(bert, tmp_path / "bare")
    theirs = json.loads((bare / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (bare / "config.json").write_text(json.dumps(theirs))
    with pytest.raises(
        ConfigError, match="give --task: audio-classification, causal-lm, image-classification"
    ):
        merge(tmp_path / "adapter", out=tmp_path / "out", full=True, model=bare)
    assert not (tmp_path / "out").exists()
    out = merge(
        tmp_path / "adapter", out=tmp_path / "out", full=True, model=bare, task="sequence-classification"
    )
    torch.testing.assert_close(says(reload(out, CLASSIFIER)), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="no task 'translation'"):
        merge(tmp_path / "adapter", out=tmp_path / "other", full=True, task="translation")


def test_an_adapter_that_is_not_whole_or_of_another_model_is_refused(bert: Path, tmp_path: Path) -> None:
    adapt(
        bert,
        tmp_path / "adapter",
        CLASSIFIER,
        task_type="SEQ_CLS",
        target_modules=["query"],
        bias="lora_only",
    )
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(weights)
    bias = next(name for name in whole if name.endswith("bias") and "query" in name)
    layer = {n: a for n, a in whole.items() if "layer.1" in n}
    stray = {n.replace("layer.1", "layer.7"): a.clone() for n, a in layer.items()}
    for arrays, words in (
        ({n: a for n, a in whole.items() if n != bias}, "query.*bias: missing"),
        ({n: a for n, a in whole.items() if n not in layer}, "layer.1.*: missing"),
        (whole | stray, "layer.7.*: not in the model"),
        ({n: a for n, a in whole.items() if "classifier" not in n}, "classifier"),
    ):
        save_file(arrays, weights, {"format": "pt"})
        with pytest.raises(ExportError, match=words):
            merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
        assert not (tmp_path / "out").exists()


def test_another_model_of_the_same_sizes_is_refused(
    bert: Path, tuned: Callable[..., Path], tmp_path: Path
) -> None:
    plain = reload(bert, CLASSIFIER)
    adapter = load_file(tuned(tmp_path / "first") / "adapter" / "adapter_model.safetensors")
    known = Provenance(origin=Origin("folder", frozen_digest(parameter_digests(plain), adapter)))
    run = tuned(tmp_path / "run", known=known)
    merge(run, out=tmp_path / "merged", full=True)
    other = shutil.copytree(bert, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["bert.encoder.layer.1.output.dense.weight"][3, 3] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(ExportError, match="not the model that was exported"):
        merge(run, out=tmp_path / "out", full=True, model=other)
    with pytest.raises(ConfigError, match="choose another --out"):
        merge(run, out=bert, full=True)


def test_what_a_checkpoint_lacks_is_drawn_as_at_export_or_refused(tmp_path: Path) -> None:
    """A BERT that was trained as a language model has no pooler, and PEFT's adapter has none either."""
    model = save(tmp_path / "model", "AutoModelForMaskedLM", transformers.BertConfig(**SIZES))
    torch.manual_seed(7)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(model, num_labels=3)
    digests = parameter_digests(plain)
    learning = peft.get_peft_model(plain, peft.LoraConfig(task_type="SEQ_CLS", target_modules=["query"]))
    run = tmp_path / "run"
    learning.save_pretrained(run / "adapter")
    with pytest.raises(ExportError, match=r"has no bert\.pooler\.dense\.bias, .*, nor has the adapter"):
        merge(run, out=tmp_path / "out", full=True)
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    for seed in (7, 8):
        known = Provenance(origin=Origin("folder", frozen_digest(digests, saved), seed))
        write_provenance(run / "adapter", known, card="")
        if seed == 7:
            merged = reload(merge(run, out=tmp_path / "out", full=True), CLASSIFIER)
            torch.testing.assert_close(says(merged), says(learning), atol=1e-6, rtol=1e-5)
        else:
            with pytest.raises(ExportError, match=r"not the model that was exported.*lacks bert\.pooler"):
                merge(run, out=tmp_path / "seed-8", full=True)


def test_a_model_that_is_gone_is_named(tuned: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere"):
        merge(tuned(tmp_path / "run"), out=tmp_path / "merged", full=True, model=tmp_path / "nowhere")
    assert not (tmp_path / "merged").exists()


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a BERT that was trained as a language model, and its artifact, exported under a relative name."""
    home = tmp_path_factory.mktemp("home")
    save(home / "minibert", "AutoModelForMaskedLM", transformers.BertConfig(**SIZES))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        export("minibert", task="sequence-classification", labels=NAMES, out="artifact", seed=3, lora_r=4)
    artifact = open_artifact(home / "artifact")
    save_peft(home / "run" / "adapter", artifact.manifest, noisy_adapter(artifact))
    return home


def test_an_exported_model_is_found_again_or_asked_for(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        transformers.AutoConfig, "from_pretrained", lambda *_, **__: pytest.fail("asked the hub")
    )
    with pytest.raises(
        ExportError, match=r"^\./minibert: the model was this folder, which is not here; give --model$"
    ):
        merge(exported / "run", out="merged", full=True)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    monkeypatch.chdir(exported)
    home = merge(exported / "run", out=tmp_path / "home", full=True)
    away = merge(exported / "run", out=tmp_path / "away", full=True, model=exported / "minibert")
    assert (home / "model.safetensors").read_bytes() == (away / "model.safetensors").read_bytes()
    config = json.loads((home / "config.json").read_text())
    assert config["id2label"] == {"0": "no", "1": "yes", "2": "maybe"}
    assert config["label2id"] == {"no": 0, "yes": 1, "maybe": 2}
    assert str(exported) not in (away / "README.md").read_text() + (away / "fleetune.json").read_text()


def test_a_merged_model_answers_as_the_device_does(exported: Path, tmp_path: Path) -> None:
    """With the layer that its checkpoint lacks, drawn from the seed of the export."""
    out = merge(exported / "run", out=tmp_path / "out", full=True, model=exported / "minibert")
    artifact = open_artifact(exported / "artifact")
    ids = IDS.numpy()
    batch = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    dataset = make_dataset(
        {n: Dense(batch[n]) for n in (row.name for row in artifact.manifest.features)},
        np.array([ids.shape[1]]),
        seq_len=ids.shape[1],
        num_classes=3,
        label_name="labels",
    )
    _, weights = read_peft(exported / "run" / "adapter")
    with open_engine(artifact, threads=1) as engine:
        found = engine.predict(dataset.rows(np.array([0])), weights, rows=engine.rows(1, ids.shape[1]))
    torch.testing.assert_close(torch.from_numpy(found), says(reload(out, CLASSIFIER)), atol=1e-5, rtol=1e-4)


def test_peft_loads_the_folder_by_the_lines_of_its_card(
    exported: Path, bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learning = peft.PeftModel.from_pretrained(reload(bert, CLASSIFIER), tuned_folder(bert, tmp_path))
    known = Provenance(
        task="sequence-classification",
        architecture="BertForSequenceClassification",
        labels=tuple(NAMES),
        model=str(bert),
    )
    write_provenance(tmp_path / "adapter", known, card=adapter_card(known))
    monkeypatch.chdir(tmp_path / "adapter")
    spoken: dict[str, Any] = {}
    lines = (tmp_path / "adapter" / "README.md").read_text().split("```python\n")[1].split("```")[0]
    exec(lines, spoken)
    torch.testing.assert_close(says(spoken["model"]), says(learning), atol=0, rtol=0)
    assert spoken["model"].config.id2label == dict(enumerate(NAMES))
    auto = peft.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=3)
    torch.testing.assert_close(says(auto), says(learning), atol=0, rtol=0)
    card = (exported / "run" / "adapter" / "README.md").read_text()
    assert 'labels = ["no","yes","maybe"]' in card


def tuned_folder(model: Path, folder: Path) -> Path:
    adapt(model, folder / "adapter", CLASSIFIER, task_type="SEQ_CLS", target_modules=["query"])
    return folder / "adapter"


def test_an_image_model_keeps_its_task_and_its_processor(tmp_path: Path) -> None:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_labels=3)
    model = save(tmp_path / "model", VIEWER, config)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(model)
    adapt_settings = {"target_modules": "all-linear", "modules_to_save": ["classifier"]}
    learning = peft.get_peft_model(reload(model, VIEWER), peft.LoraConfig(r=4, **adapt_settings))
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1 if parameter.requires_grad else 0)
    loaded = describe(learning, None, task="image-classification", source=str(model))
    arrays = {n: p.numpy() for n, p in peft.get_peft_model_state_dict(learning).items()}
    write_peft(tmp_path / "run" / "adapter", loaded.peft_config, arrays)
    known = Provenance(task="image-classification", labels=tuple(NAMES))
    write_provenance(tmp_path / "run" / "adapter", known, card="")
    pixels = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        auto = peft.AutoPeftModel.from_pretrained(tmp_path / "run" / "adapter", num_labels=3).eval()
        merged = reload(
            merge(tmp_path / "run", out=tmp_path / "out", full=True), "AutoModelForImageClassification"
        )
        torch.testing.assert_close(merged.eval()(pixels).logits, auto(pixels).logits, atol=1e-5, rtol=1e-4)
    assert merged.config.id2label == dict(enumerate(NAMES))
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").size["height"] == 8


def test_a_tagger_keeps_its_tokenizer(tmp_path: Path) -> None:
    config = transformers.BertConfig(num_labels=3, **SIZES)
    model = save(tmp_path / "model", TAGGER, config)
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "on": 1, "off": 2}, "[UNK]"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(model)
    settings = {"task_type": "TOKEN_CLS", "target_modules": ["query", "dense"]}
    expected = adapt(model, tmp_path / "adapter", TAGGER, **settings)
    out = merge(tmp_path / "adapter", out=tmp_path / "out", full=True)
    torch.testing.assert_close(says(reload(out, TAGGER)), expected, atol=1e-5, rtol=1e-4)
    assert transformers.AutoTokenizer.from_pretrained(out)("off on")["input_ids"] == [2, 1]
    assert len({path.stat().st_mode for path in out.iterdir()}) == 1


def test_options_of_a_merged_model_need_full(tuned: Callable[..., Path], tmp_path: Path) -> None:
    for more in ({"labels": NAMES}, {"task": "causal-lm"}, {"model": tmp_path}):
        with pytest.raises(ConfigError, match="give --full or --onnx as well"):
            merge(tuned(tmp_path / next(iter(more))), out=tmp_path / "out", **more)
