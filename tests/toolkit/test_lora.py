"""LoRA on a loaded model: where it goes by itself, what is refused, and an adapter that comes in whole or not at all."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.lora import adapter_names, attach_lora, continue_adapter, load_adapter, parse_targets

SEQUENCE, IMAGE = "sequence-classification", "image-classification"
SIZES = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def bert() -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, num_labels=3, **SIZES)
    return transformers.BertForSequenceClassification(config)


def targets_of(model: Any) -> set[str]:
    return {n.removeprefix("base_model.model.") for n, m in model.named_modules() if hasattr(m, "lora_A")}


def test_fresh_lora_goes_where_peft_knows_it_to_be_good() -> None:
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=None)
    self_attention = [f"bert.encoder.layer.{i}.attention.self" for i in range(2)]
    assert targets_of(learning) == {f"{at}.{name}" for at in self_attention for name in ("query", "value")}
    assert learning.peft_config["default"].lora_dropout == 0.0


def test_of_an_architecture_that_peft_does_not_know_every_linear_in_the_blocks_is_taken() -> None:
    model = bert()
    model.config.model_type = "nobody-knows"
    found = targets_of(attach_lora(model, task=SEQUENCE, r=2, alpha=4, target_modules=None))
    assert len(found) == 2 * 6
    assert all(name.startswith("bert.encoder.layer.") for name in found)


def test_an_image_head_learns_though_peft_has_no_such_task() -> None:
    config = transformers.ViTConfig(**SIZES, image_size=8, patch_size=4, num_channels=2, num_labels=3)
    model = transformers.ViTForImageClassification(config)
    learning = attach_lora(model, task=IMAGE, r=2, alpha=4, target_modules=None)
    assert "base_model.model.classifier.weight" in adapter_names(learning).values()


def test_a_target_that_matches_nothing_lists_what_there_is() -> None:
    with pytest.raises(
        ExportError,
        match=r"'q_proj': no linear module of this model; those are .*key, query, value",
    ):
        attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query", "q_proj"])


@pytest.mark.parametrize("use_dora", [False, True])
def test_names_are_those_of_the_saved_file(use_dora: bool, tmp_path: Path) -> None:
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query"], use_dora=use_dora)
    learning.save_pretrained(tmp_path)
    names, saved = adapter_names(learning), load_file(tmp_path / WEIGHTS)
    assert set(names.values()) == saved.keys()
    for own, name in names.items():
        assert torch.equal(learning.get_parameter(own), saved[name])


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """An adapter of a BERT, every tensor of it non-zero."""
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query"])
    with torch.no_grad():
        for parameter in learning.parameters():
            parameter.add_(torch.randn_like(parameter) if parameter.requires_grad else 0)
    learning.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_comes_in_and_goes_on_learning(saved: Path) -> None:
    learning, content = load_adapter(bert(), str(saved)), load_file(saved / WEIGHTS)
    for own, name in adapter_names(learning).items():
        assert torch.equal(learning.get_parameter(own), content[name])
        assert learning.get_parameter(own).requires_grad


def test_a_tensor_that_is_missing_is_named_and_not_drawn_anew(saved: Path) -> None:
    content = load_file(saved / WEIGHTS)
    gone = "base_model.model.bert.encoder.layer.1.attention.self.query.lora_B.weight"
    del content[gone]
    save_file(content, saved / WEIGHTS)
    with pytest.raises(ExportError, match=rf"not a PEFT adapter for this model: 1 missing, {gone}"):
        load_adapter(bert(), str(saved))


def test_an_adapter_for_more_layers_is_refused(saved: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=12, num_labels=3, **{**SIZES, "num_hidden_layers": 1}
    )
    with pytest.raises(ExportError, match=r"not a PEFT adapter for this model: .*layer\.1\."):
        load_adapter(transformers.BertForSequenceClassification(config), str(saved))


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": ["query"]}))
    with pytest.raises(ExportError, match="an adapter without weights"):
        load_adapter(bert(), str(tmp_path))


ENCODER = "bert.encoder.layer"


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (None, []),
        ("query", ["query"]),
        ("query, value,", ["query", "value"]),
        ("", []),
        ("attention.self.query,h.0", ["attention.self.query", "h.0"]),
        (("query", "value"), ["query", "value"]),
        ("all-linear", "all-linear"),
        (["all-linear"], "all-linear"),
        (r".*\.(query|value)", r".*\.(query|value)"),
        (r".*\.\d{1,2}\..*query", r".*\.\d{1,2}\..*query"),
        ("all-linear,query", "all-linear,query"),
    ],
)
def test_targets_are_names_or_what_peft_takes_as_one_string(given: Any, parsed: object) -> None:
    assert parse_targets(given) == parsed


@pytest.mark.parametrize(
    ("given", "targets"),
    [
        (r".*layer\.1\..*\.(query|value)", {f"{ENCODER}.1.attention.self.{n}" for n in ("query", "value")}),
        (r".*layer\.\d{1,2}\.intermediate\.dense", {f"{ENCODER}.{i}.intermediate.dense" for i in (0, 1)}),
        (r"bert\..*key", {f"{ENCODER}.{i}.attention.self.key" for i in (0, 1)}),
        ("self.key", {f"{ENCODER}.{i}.attention.self.key" for i in (0, 1)}),
    ],
)
def test_an_expression_is_matched_against_whole_names(given: str, targets: set[str]) -> None:
    assert targets_of(attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=given)) == targets


def test_all_linear_is_every_linear_but_the_head() -> None:
    found = targets_of(attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules="all-linear"))
    assert len(found) == 2 * 6 + 1
    assert "classifier" not in found


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("layer.*q_proj", r"'layer\.\*q_proj': no linear module of this model; .*key, query, value"),
        (r"encoder\.layer\.0\..*query", "no linear module of this model"),
        (".*embeddings", "no linear module of this model"),
        ("*query", r"no regular expression: nothing to repeat"),
        ([".*query"], r"'\.\*query': no linear module of this model"),
    ],
)
def test_an_expression_that_fits_nothing_is_refused(given: Any, said: str) -> None:
    with pytest.raises(ExportError, match=said):
        attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=given)


@pytest.mark.parametrize(
    ("fresh", "saved"),
    [
        ((), {"classifier"}),
        (("classifier.weight", "classifier.bias"), {"classifier"}),
        (("bert.pooler.dense.weight", "bert.pooler.dense.bias"), {"classifier", "bert.pooler.dense"}),
    ],
)
def test_what_is_drawn_anew_is_trained_whole_and_saved(fresh: tuple[str, ...], saved: set[str]) -> None:
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query"], fresh=fresh)
    names = {n.removeprefix("base_model.model.") for n in adapter_names(learning).values()}
    assert {n.removesuffix(".weight") for n in names if n.endswith(".weight") and "lora" not in n} == saved


def body_adapter(folder: Path, **settings: Any) -> Path:
    """An adapter of the body alone, as PEFT saves it of the classifier."""
    config = peft.LoraConfig(r=2, target_modules=["query"], init_lora_weights=False, **settings)
    peft.get_peft_model(bert(), config).save_pretrained(folder)
    return folder


def test_an_adapter_of_the_bare_model_is_refused_with_what_is_missing_and_what_has_no_place(
    tmp_path: Path,
) -> None:
    config = peft.LoraConfig(r=2, target_modules=["query"], task_type="FEATURE_EXTRACTION")
    peft.get_peft_model(bert().bert, config).save_pretrained(tmp_path)
    missing = r"4 missing, base_model\.model\.bert\.encoder\.layer\.0"
    with pytest.raises(
        ExportError, match=rf"{missing}.*; 4 that the model has no place for, base_model\.model\.enc"
    ):
        load_adapter(bert(), str(tmp_path))


def test_an_adapter_for_fewer_layers_is_refused(saved: Path) -> None:
    config = transformers.BertConfig(
        vocab_size=50, max_position_embeddings=12, num_labels=3, **{**SIZES, "num_hidden_layers": 3}
    )
    with pytest.raises(ExportError, match=r"2 missing, .*layer\.2\."):
        load_adapter(transformers.BertForSequenceClassification(config), str(saved))


def test_an_adapter_of_another_head_is_refused(saved: Path) -> None:
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, num_labels=4, **SIZES)
    with pytest.raises(ExportError, match=r"classifier\S*\.weight is \[3, 8\], expected \[4, 8\]; "):
        load_adapter(transformers.BertForSequenceClassification(config), str(saved))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", [WEIGHTS, "adapter_model.bin"])
def test_an_adapter_of_any_precision_and_file_comes_in(saved: Path, dtype: torch.dtype, name: str) -> None:
    content = {n: t.to(dtype) for n, t in load_file(saved / WEIGHTS).items()}
    (saved / WEIGHTS).unlink()
    (torch.save if name.endswith(".bin") else save_file)(content, saved / name)
    learning = load_adapter(bert(), str(saved))
    for own, of_file in adapter_names(learning).items():
        assert learning.get_parameter(own).dtype == torch.float32
        assert learning.get_parameter(own).equal(content[of_file].float())


@pytest.mark.parametrize(
    "settings",
    [
        {"use_dora": True},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"rank_pattern": {"layer.1.attention.self.query": 3}, "alpha_pattern": {"layer.0": 5}},
        {"modules_to_save": ["pooler"]},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_peft_can_write_comes_in_whole(settings: dict[str, Any], tmp_path: Path) -> None:
    folder = body_adapter(tmp_path, task_type="SEQ_CLS", **settings)
    learning, content = load_adapter(bert(), str(folder)), load_file(folder / WEIGHTS)
    names = adapter_names(learning)
    assert set(names.values()) == content.keys()
    assert all(learning.get_parameter(own).equal(content[name]) for own, name in names.items())


def test_biases_of_everything_are_refused_with_a_hint(tmp_path: Path) -> None:
    folder = body_adapter(tmp_path, task_type="SEQ_CLS", bias="all")
    with pytest.raises(ExportError, match='bias="all" is not supported: train with'):
        load_adapter(bert(), str(folder))


def test_an_adapter_in_a_folder_of_its_name_is_pointed_at(tmp_path: Path) -> None:
    learning = attach_lora(bert(), task=SEQUENCE, r=2, alpha=4, target_modules=["query"])
    learning.add_adapter("lora", peft.LoraConfig(r=2, target_modules=["query"], task_type="SEQ_CLS"))
    learning.save_pretrained(tmp_path, selected_adapters=["lora"])
    with pytest.raises(ExportError, match=r"no PEFT adapter here .*; there is one in .*/lora$"):
        load_adapter(bert(), str(tmp_path))
    assert adapter_names(load_adapter(bert(), str(tmp_path / "lora")))


def test_an_adapter_that_is_no_lora_is_refused(tmp_path: Path) -> None:
    config = peft.IA3Config(target_modules=["query"], feedforward_modules=[], task_type="SEQ_CLS")
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"an adapter of type IA3; only LoRA"):
        load_adapter(bert(), str(tmp_path))


def test_an_activated_lora_is_refused(saved: Path) -> None:
    changed = {"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}
    (saved / CONFIG).write_text(json.dumps(json.loads((saved / CONFIG).read_text()) | changed))
    with pytest.raises(ExportError, match=r"an activated LoRA \(alora_invocation_tokens\)"):
        load_adapter(bert(), str(saved))


def test_an_adapter_that_is_not_finite_is_refused(saved: Path) -> None:
    content = load_file(saved / WEIGHTS)
    name = next(n for n in content if "lora_A" in n)
    content[name][0, 0] = float("nan")
    save_file(content, saved / WEIGHTS)
    with pytest.raises(ExportError, match=rf"{name} holds NaN or infinity"):
        load_adapter(bert(), str(saved))


def test_the_model_that_an_adapter_was_made_for_and_its_dropout_are_told(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    changed = {"base_model_name_or_path": "elsewhere/other-bert", "lora_dropout": 0.1}
    (saved / CONFIG).write_text(json.dumps(config | changed))
    model, notes = bert(), []
    model.config._name_or_path = "here/bert"
    load_adapter(model, str(saved), tell=notes.append)
    assert notes == [
        "adapter: made for elsewhere/other-bert, the model is here/bert",
        "adapter: lora_dropout 0.1; devices train without dropout",
    ]


def test_a_head_that_neither_checkpoint_nor_adapter_has_is_refused(tmp_path: Path) -> None:
    folder, head = body_adapter(tmp_path), ("classifier.weight", "classifier.bias")
    with pytest.raises(
        ExportError, match=r"classifier\.weight, classifier\.bias: neither in .*task type: none"
    ):
        continue_adapter(bert(), str(folder), fresh=head, task=SEQUENCE)


def test_an_adapter_of_another_task_is_told(tmp_path: Path) -> None:
    """Of as many classes its head fits, and nothing else would show it."""
    notes: list[str] = []
    learning = attach_lora(bert(), task="token-classification", r=2, alpha=4, target_modules=["query"])
    learning.save_pretrained(tmp_path)
    continue_adapter(bert(), str(tmp_path), task=SEQUENCE, fresh=(), tell=notes.append)
    assert notes == [
        "adapter: made for TOKEN_CLS, its tensors fit sequence-classification; its head goes on from the other task's"
    ]
    notes.clear()
    continue_adapter(bert(), str(tmp_path), task="token-classification", fresh=(), tell=notes.append)
    assert notes == []


def test_a_lora_in_the_head_trains_it(tmp_path: Path) -> None:
    config, notes = peft.LoraConfig(r=2, target_modules=["classifier"]), []
    peft.get_peft_model(bert(), config).save_pretrained(tmp_path)
    continue_adapter(bert(), str(tmp_path), task=SEQUENCE, fresh=(), tell=notes.append)
    assert notes == []


def test_a_head_of_the_checkpoint_that_is_not_trained_is_told(tmp_path: Path) -> None:
    notes: list[str] = []
    continue_adapter(bert(), str(body_adapter(tmp_path)), fresh=(), task=SEQUENCE, tell=notes.append)
    assert notes == ["head: the adapter trains none; the checkpoint's stays as it is"]


def test_a_head_in_the_adapter_makes_up_for_none_in_the_checkpoint(saved: Path) -> None:
    notes: list[str] = []
    head = ("classifier.weight", "classifier.bias")
    learning = continue_adapter(bert(), str(saved), fresh=head, task=SEQUENCE, tell=notes.append)
    content = load_file(saved / WEIGHTS)["base_model.model.classifier.weight"]
    assert learning.get_parameter("base_model.model.classifier.modules_to_save.default.weight").equal(content)
    assert notes == []


def test_a_tensor_that_peft_does_not_take_over_is_refused(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = peft.PeftModel.from_pretrained

    def losing(*args: Any, **settings: Any) -> Any:
        learning = load(*args, **settings)
        next(p for n, p in learning.named_parameters() if "lora_B" in n).data.zero_()
        return learning

    monkeypatch.setattr(peft.PeftModel, "from_pretrained", losing)
    with pytest.raises(ExportError, match=r"layer\.0\..*lora_B\.weight was not taken over"):
        load_adapter(bert(), str(saved))
