"""A model is loaded, or refused in one line that says what is wrong with it."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_tokenizers import byte_tokenizer, word_tokenizer

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.hearing import listening, told_shortly
from fleetune.toolkit.models import licence_of, load_checkpoint, load_model

SEQUENCE, CAUSAL = "sequence-classification", "causal-lm"
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT without a head and without tokenizer."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **SIZES)
    transformers.BertModel(config).save_pretrained(folder)
    return folder


def test_labels_are_kept_and_a_fresh_head_is_drawn_from_the_seed(bert: Path) -> None:
    model, tokenizer = load_model(str(bert), task=SEQUENCE, labels=["no", "yes", "maybe"], seed=3)
    again, _ = load_model(str(bert), task=SEQUENCE, labels=["no", "yes", "maybe"], seed=3)
    other, _ = load_model(str(bert), task=SEQUENCE, labels=["no", "yes", "maybe"], seed=4)
    assert tokenizer is None
    assert model.config.id2label == {0: "no", 1: "yes", 2: "maybe"}
    assert model.classifier.weight.dtype == torch.float32
    assert torch.equal(model.classifier.weight, again.classifier.weight)
    assert not torch.equal(model.classifier.weight, other.classifier.weight)


def test_attention_is_eager_and_nothing_is_cached(bert: Path) -> None:
    model, _ = load_model(str(bert), task=SEQUENCE, labels=["no", "yes"])
    assert model.config._attn_implementation == "eager"
    assert model.config.use_cache is False


def test_a_model_that_does_not_do_the_task_is_refused(tmp_path: Path) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "num_channels": 2}
    transformers.ViTModel(transformers.ViTConfig(**SIZES, **sizes)).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"not a model for causal-lm: .*ViTConfig"):
        load_model(str(tmp_path), task=CAUSAL, labels=[])


def test_an_encoder_decoder_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    transformers.T5Config(d_model=8, num_layers=1, num_heads=2, vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match="T5Config is an encoder-decoder"):
        load_model(str(tmp_path), task=CAUSAL, labels=[])


@pytest.mark.parametrize(
    ("card", "licence"),
    [(None, "not stated"), ("# Model\n", "not stated"), ("---\nlicense: mit\n---\n", "mit")],
)
def test_the_licence_is_that_of_the_card(card: str | None, licence: str, tmp_path: Path) -> None:
    if card is not None:
        (tmp_path / "README.md").write_text(card)
    assert licence_of(str(tmp_path)) == licence


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("\n\nfirst\nsecond"), "first"),
        (ValueError("first:\n  second\nthird"), "first: second"),
        (KeyError(), "KeyError"),
        (KeyError("dense"), "KeyError 'dense'"),
    ],
)
def test_an_error_of_many_lines_becomes_one(error: Exception, told: str) -> None:
    with pytest.raises(ExportError, match=rf"^it: {told}$"), told_shortly("it"):
        raise error


def test_a_refusal_of_our_own_stays_as_it_is() -> None:
    with pytest.raises(ExportError, match=r"^mine$"), told_shortly("it"):
        raise ExportError("mine")


def test_what_is_logged_or_warned_of_becomes_a_line_once_and_goes_nowhere_else() -> None:
    told: list[str] = []
    root = logging.getLogger("transformers")
    before = root.handlers, root.propagate, root.level
    logger = logging.getLogger("transformers.modeling_utils")
    with listening(told.append):
        logger.warning("first line\nand second")
        logger.info("of no concern")
        assert len(root.handlers) == 1
        assert root.handlers is not before[0]
        assert not root.propagate
        warnings.warn("twice", UserWarning, stacklevel=1)
        warnings.warn("twice", UserWarning, stacklevel=1)
        warnings.warn("of our code", FutureWarning, stacklevel=1)
        warnings.warn("Found missing adapter keys while loading", UserWarning, stacklevel=1)
    assert told == ["first line and second", "twice"]
    assert (root.handlers, root.propagate, root.level) == before


def classifier(folder: Path, **settings: Any) -> Path:
    """A BERT for classes with a trained head."""
    torch.manual_seed(0)
    sizes = SIZES | {"num_hidden_layers": 2}
    config = transformers.BertConfig(vocab_size=50, max_position_embeddings=12, **sizes, **settings)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def without(folder: Path, *names: str, **more: torch.Tensor) -> Path:
    """The folder's model without some of its weights, and with others."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in weights.items() if not name.startswith(names or ("-",))}
    save_file(kept | more, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def notes_of(folder: Path, *, task: str = SEQUENCE, labels: tuple[str, ...] = ("no", "yes")) -> list[str]:
    notes: list[str] = []
    load_checkpoint(str(folder), task=task, labels=labels, tell=notes.append)
    return [note for note in notes if not note.startswith("tokenizer: none")]


def test_a_whole_model_leaves_nothing_to_tell(tmp_path: Path) -> None:
    assert notes_of(classifier(tmp_path)) == []


@pytest.mark.parametrize(
    "gone", ["bert.encoder.layer.1.attention.self.query.bias", "bert.embeddings.position", "bert.encoder"]
)
def test_weights_of_the_body_that_are_missing_are_refused(gone: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"of the weights of BertFor.* would be random, .*: {gone}"):
        notes_of(without(classifier(tmp_path), gone))


def test_a_checkpoint_of_fewer_layers_than_its_configuration_says_is_refused(tmp_path: Path) -> None:
    config = json.loads((classifier(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ExportError, match=r"16 would be random, .*: bert\.encoder\.layer\.2"):
        notes_of(tmp_path)


def test_layers_that_are_left_out_are_told(tmp_path: Path) -> None:
    config = json.loads((classifier(tmp_path) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    (note,) = notes_of(tmp_path)
    assert note.startswith("weights: 16 of the checkpoint have no place in this model: bert.encoder.layer.1")


def test_another_shape_in_the_body_is_refused(tmp_path: Path) -> None:
    short = {"bert.embeddings.position_embeddings.weight": torch.zeros(11, 8)}
    with pytest.raises(ExportError, match=r"another shape there.*bert\.embeddings\.position_embeddings"):
        notes_of(without(classifier(tmp_path), **short))


def test_a_language_model_without_its_head_is_refused(tmp_path: Path) -> None:
    config = transformers.LlamaConfig(vocab_size=50, **SIZES)
    transformers.LlamaModel(config).save_pretrained(tmp_path)
    with pytest.raises(ExportError, match=r"of LlamaForCausalLM 1 would be random.*lm_head\.weight"):
        notes_of(tmp_path, task=CAUSAL, labels=())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(value: float, tmp_path: Path) -> None:
    broken = {"classifier.bias": torch.tensor([0.0, value])}
    with pytest.raises(ExportError, match=r"classifier\.bias holds NaN or infinity"):
        notes_of(without(classifier(tmp_path), **broken))


def test_a_head_that_is_not_there_is_drawn_and_told(bert: Path) -> None:
    made = load_checkpoint(str(bert), task=SEQUENCE, labels=["no", "yes"])
    assert made.fresh == ("classifier.weight", "classifier.bias")
    assert notes_of(bert) == [
        "weights: not in the checkpoint, so drawn from the seed: classifier.weight, classifier.bias"
    ]


def test_a_pooler_that_is_not_there_is_fresh_too(tmp_path: Path) -> None:
    made = load_checkpoint(
        str(without(classifier(tmp_path), "bert.pooler")), task=SEQUENCE, labels=["a", "b"]
    )
    assert made.fresh == ("bert.pooler.dense.weight", "bert.pooler.dense.bias")


def test_a_head_for_other_classes_is_replaced_and_told(tmp_path: Path) -> None:
    notes = notes_of(classifier(tmp_path), labels=("a", "b", "c"))
    assert notes[-1] == "head: the checkpoint's is for 2 classes, 3 are asked for: a new one"
    assert "drawn from the seed: classifier.weight, classifier.bias" in notes[0]


def test_a_head_that_is_kept_under_other_names_is_told(tmp_path: Path) -> None:
    classifier(tmp_path, id2label={0: "yes", 1: "no"}, problem_type="multi_label_classification")
    first, second = notes_of(tmp_path)
    assert "knows them in another order: yes, no; given no, yes" in first
    assert second.startswith("head: the checkpoint's is for multi_label_classification")


def test_a_tokenizer_comes_with_its_model(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(classifier(tmp_path))
    _, tokenizer = load_model(str(tmp_path), task=SEQUENCE, labels=["no", "yes"])
    assert tokenizer("lamp")["input_ids"] == [2, 8, 3]


@pytest.mark.parametrize("cut", [0, 20, 300])
def test_a_tokenizer_that_cannot_be_read_is_refused(cut: int, tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(classifier(tmp_path))
    whole = (tmp_path / "tokenizer.json").read_bytes()
    (tmp_path / "tokenizer.json").write_bytes(whole[:cut])
    said = (
        r"its tokenizer cannot be read: tokenizer\.json: no JSON object; mend it, or remove tokenizer\.json"
    )
    with pytest.raises(ExportError, match=said):
        notes_of(tmp_path)


def test_a_tokenizer_that_is_json_and_none_is_refused(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(classifier(tmp_path))
    (tmp_path / "tokenizer.json").write_text('{"version": "1.0"}')
    with pytest.raises(ExportError, match="its tokenizer cannot be read: KeyError 'added_tokens'; mend it"):
        notes_of(tmp_path)


def test_settings_of_a_tokenizer_without_its_vocabulary_are_refused(tmp_path: Path) -> None:
    word_tokenizer().save_pretrained(classifier(tmp_path))
    (tmp_path / "tokenizer.json").unlink()
    said = r"no vocabulary \(tokenizer\.json, .* is there; mend it, or remove tokenizer_config\.json: data"
    with pytest.raises(ExportError, match=said):
        notes_of(tmp_path)


@pytest.mark.parametrize("config", [transformers.BertConfig, transformers.DebertaV2Config])
def test_no_tokenizer_at_all_is_told_and_none_is_made_up(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = config(vocab_size=50, max_position_embeddings=12, **SIZES)
    transformers.AutoModelForSequenceClassification.from_config(made).save_pretrained(tmp_path)
    notes: list[str] = []
    found = load_checkpoint(str(tmp_path), task=SEQUENCE, labels=["no", "yes"], tell=notes.append)
    assert found.tokenizer is None
    assert notes == ["tokenizer: none beside the model; data are NPZ files of ids"]


def test_a_decoder_without_padding_takes_the_end_of_text_and_knows_it(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    config = transformers.GPT2Config(
        vocab_size=len(tokenizer), n_embd=8, n_layer=1, n_head=2, n_positions=12, num_labels=2
    )
    config.eos_token_id = config.bos_token_id = tokenizer.eos_token_id
    transformers.GPT2ForSequenceClassification(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model, _ = load_model(str(tmp_path), task=SEQUENCE, labels=["no", "yes"])
    assert model.config.pad_token_id == tokenizer.eos_token_id == len(tokenizer) - 1


def test_a_model_folder_is_left_as_it_was(tmp_path: Path) -> None:
    folder = classifier(tmp_path / "model")
    shutil.copytree(folder, tmp_path / "before")
    notes_of(folder)
    assert [p.read_bytes() for p in sorted(folder.iterdir())] == [
        p.read_bytes() for p in sorted((tmp_path / "before").iterdir())
    ]
