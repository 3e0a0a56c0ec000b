"""Writes a model with an adapter merged in, having found out what the model is and that it is the right one."""

import contextlib
import gc
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import peft
import torch
import transformers

from fleetune.device_runtime.contracts.provenance import Provenance, merged_card, write_provenance
from fleetune.device_runtime.errors import ExportError, some
from fleetune.toolkit.agreement import padding_settings
from fleetune.toolkit.exact_merge import merge_exactly
from fleetune.toolkit.hearing import Tell, in_short, told_shortly
from fleetune.toolkit.merged_task import Adapter, choose_task, name_classes, read_adapter
from fleetune.toolkit.models import licence_of
from fleetune.toolkit.onnx_model import write_onnx
from fleetune.toolkit.origin import WHOLE, frozen_digest, parameter_digests
from fleetune.toolkit.sources import processor_files, tokenizer_files
from fleetune.toolkit.stored_dtypes import cast_as_stored
from fleetune.toolkit.tasks import TASKS
from fleetune.toolkit.widening import widened

_KNOWN = ("tie_word_embeddings", "save_embedding_layers", "fan_in_fan_out")
"""In PEFT's warnings of what merge_exactly proves right, or of how adapters are saved."""

Say = Callable[[str], None]


class Source(NamedTuple):
    """Where the original model is: a folder, or a hub id that is looked for in the cache or, if it may, on the hub."""

    name: str
    may_ask_hub: bool

    def read(self, kind: str, **settings: Any) -> Any:
        """Whatever ``kind``, a class of transformers, makes of it."""
        found = getattr(transformers, kind)
        return found.from_pretrained(self.name, local_files_only=not self.may_ask_hub, **settings)


def write_merged(
    out: Path,
    folder: Path,
    provenance: Provenance,
    *,
    source: Source,
    labels: Sequence[str] | Path | None,
    task: str | None,
    say: Say,
    onnx: bool = False,
) -> None:
    """Merge the PEFT folder into the model at ``source`` and save it, with its tokenizer, into ``out``; with ``onnx`` as ONNX.

    Raises:
        ConfigError: no such task, or none can be told.
        ArtifactError: the adapter is of other classes than its labels.
        ExportError: no such model, another than the adapter's, or a merged model that differs from the two.
    """

    def tell(note: str) -> None:
        say(f"note: {note}")

    with torch.random.fork_rng(devices=[]), _notes(tell):
        say(f"loading {source.name}")
        with told_shortly(f"{source.name}: no model to merge into, give --model"):
            config = source.read("AutoConfig")
        adapter = read_adapter(folder)
        chosen = choose_task(task, provenance, adapter, config)
        names = name_classes(labels, provenance, adapter, config, chosen)
        tokenizer = _reader(source, "AutoTokenizer", tokenizer_files(source.name), tell)
        pads = padding_settings(config, tokenizer, tell=tell)
        plain = _load(source, chosen, names, provenance, adapter, more=pads, aside=out.parent)
        say("merging")
        merged = merge_exactly(_attach(plain, adapter), tell)
        architecture = type(merged).__name__
        kind = "AutoFeatureExtractor" if chosen == "audio-classification" else "AutoImageProcessor"
        processor = _reader(source, kind, processor_files(source.name), tell)
        if onnx:
            say("tracing, and comparing what onnxruntime answers")
            write_onnx(merged, [tokenizer, processor], out, task=chosen)
        else:
            cast_as_stored(merged, source.name, config)
            say("writing")
            _save(merged, [tokenizer, processor], out)
            say("reading back what was written")
            wanted = parameter_digests(merged)
            del plain, merged  # what is read back takes their place in memory
            gc.collect()
            _check_saved(wanted, out, chosen)
    told = msgspec.structs.replace(
        provenance,
        task=chosen,
        labels=tuple(names),
        architecture=architecture,
        model=Path(source.name).name if Path(source.name).is_dir() else source.name,
        licence=provenance.licence or licence_of(source.name),
        tensors={},
    )
    write_provenance(out, told, card=merged_card(told, library="onnx" if onnx else "transformers"))


@contextlib.contextmanager
def _notes(tell: Tell) -> Iterator[None]:
    """What PEFT and transformers warn of is told, once each, but for what is seen to here; no bars, no reports."""
    log = transformers.logging
    verbosity, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", UserWarning)
            yield
    finally:
        log.set_verbosity(verbosity)
        if bars:
            log.enable_progress_bar()
    messages = [str(w.message).strip() for w in caught if issubclass(w.category, UserWarning)]
    for line in dict.fromkeys(m.splitlines()[0] for m in messages if not any(known in m for known in _KNOWN)):
        tell(line)


def _load(
    source: Source,
    task: str,
    names: Sequence[str],
    provenance: Provenance,
    adapter: Adapter,
    *,
    more: Mapping[str, Any],
    aside: Path,
) -> Any:
    """The model in float32, as export loaded it: what its checkpoint lacks is drawn from the same seed.

    Of half precision it is mapped from a file in ``aside`` (:mod:`fleetune.toolkit.widening`).

    Raises:
        ExportError: not the model that was exported, or one that lacks what the adapter does not bring.
    """
    settings: dict[str, Any] = {
        "dtype": torch.float32,
        "attn_implementation": "eager",
        **more,
    }
    if names:
        settings |= {
            "id2label": dict(enumerate(names)),
            "label2id": {name: i for i, name in enumerate(names)},
            "ignore_mismatched_sizes": True,
        }
    if names and provenance.task:  # a pipeline would answer by the loss of the checkpoint's head
        settings["problem_type"] = provenance.problem_type or None
    torch.manual_seed(provenance.origin.seed)
    with told_shortly(f"{source.name}: not a model for {task}"), widened(source.name, aside=aside) as folder:
        model, info = source._replace(name=folder).read(
            TASKS[task].auto_class, output_loading_info=True, **settings
        )
    model.config._name_or_path = source.name
    drawn = {*info["missing_keys"], *(row[0] for row in info["mismatched_keys"])}
    drawn -= {name.removeprefix(WHOLE) for name in adapter.tensors}
    _check_model(model, sorted(drawn), provenance.origin.sha256, source.name, adapter)
    return model


def _check_model(model: Any, drawn: list[str], exported: str, source: str, adapter: Adapter) -> None:
    if exported and frozen_digest(parameter_digests(model), adapter.tensors) != exported:
        lacking = f" (its checkpoint lacks {some(drawn)})" if drawn else ""
        raise ExportError(
            f"{source}: not the model that was exported: its weights differ{lacking}; give --model"
        )
    if drawn and not exported:
        raise ExportError(
            f"{source}: has no {some(drawn)}, nor has the adapter: drawn at random when the adapter was trained, and lost"
        )


def _attach(plain: Any, adapter: Adapter) -> Any:
    """The model with its adapter; ExportError where PEFT only warns: a tensor without place, a place without tensor."""
    what = f"{adapter.folder}: not a PEFT adapter for this model"
    with told_shortly(what):
        learning = peft.PeftModel.from_pretrained(plain, str(adapter.folder), is_trainable=True)
        result = peft.set_peft_model_state_dict(learning, adapter.tensors)
        saves = peft.get_peft_model_state_dict(learning, save_embedding_layers=False)
    learns = {name for name, parameter in learning.named_parameters() if parameter.requires_grad}
    problems = [f"{name}: not in the model" for name in result.unexpected_keys if name not in saves]
    problems += [f"{name}: missing" for name in sorted(learns & set(result.missing_keys))]
    if problems:
        raise ExportError(f"{what}: {some(problems)}")
    return learning


def _reader(source: Source, kind: str, files: Sequence[str], tell: Tell) -> Any:
    """Tokenizer or image processor of the model; None without one, or where transformers makes up an empty one.

    Where there are ``files`` of one that cannot be read, it is told.
    """
    try:
        found = source.read(kind)
    except Exception as exc:  # noqa: BLE001 - a folder without one fails in many ways, and each means the same
        if files:
            tell(f"{', '.join(files)}: not read as {kind}, so not beside the merged model: {in_short(exc)}")
        return None
    tokens = getattr(found, "all_special_tokens", None)
    return None if tokens is not None and len(found) <= len(tokens) else found


def _save(merged: Any, readers: Sequence[Any], out: Path) -> None:
    """Write model and readers."""
    with told_shortly(f"{out.name}: cannot be written"):
        for part in (merged, *readers):
            if part is not None:
                part.save_pretrained(str(out))


def _check_saved(wanted: dict[str, str], out: Path, task: str) -> None:
    """Read the model back as anyone will; ExportError unless it is the same to the bit."""
    with told_shortly("the merged model cannot be read back"), widened(str(out), aside=out.parent) as folder:
        model, info = Source(folder, may_ask_hub=False).read(
            TASKS[task].auto_class, output_loading_info=True, dtype=torch.float32
        )
    found = parameter_digests(model)
    wrong = {*info["missing_keys"], *info["unexpected_keys"]}
    wrong |= {name for name in wanted.keys() | found.keys() if found.get(name) != wanted.get(name)}
    if wrong:
        raise ExportError(f"the merged model does not come back as it was written: {some(sorted(wrong))}")
