"""A model is loaded, or refused in one line that says what is wrong with it."""

import logging
import warnings
from pathlib import Path

import pytest
import torch
import transformers

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.hearing import listening, told_shortly
from fleetune.toolkit.models import licence_of, load_model

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
    ("error", "told"), [(ValueError("\n\nfirst\nsecond"), "first"), (KeyError(), "KeyError")]
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
