"""``fleetune merge``, out of a run: a PEFT adapter folder that Hugging Face PEFT loads, or a whole merged model."""

import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fleetune.broker.store.kept_versions import read_version
from fleetune.device_runtime.arrays import Arrays, parse_arrays
from fleetune.device_runtime.contracts.adapters import CONFIG, read_peft, write_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.provenance import (
    CARD,
    Provenance,
    adapter_card,
    provenance_of,
    read_provenance,
    write_provenance,
)
from fleetune.device_runtime.contracts.run_file import ADAPTER, LEDGER, RUN, find_adapter, run_folder
from fleetune.device_runtime.contracts.run_file import read_labels as labels_of_run
from fleetune.device_runtime.errors import ArtifactError, ConfigError, some
from fleetune.toolkit.merge_place import new_folder, refuse_overlap
from fleetune.toolkit.origin import find_model

log = logging.getLogger(__name__)

_SIDES = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}
_BESIDE = (
    "*token*.json",
    "*token*.model",
    "vocab.*",
    "merges.txt",
    "chat_template.*",
    "*processor_config.json",
    CARD,
)
"""What others may have put beside an adapter, and PEFT or transformers read."""


class Given(NamedTuple):
    """An adapter in hand. ``folder`` is where PEFT finds it, None for a version out of a ledger."""

    where: Path
    config: dict[str, Any]
    arrays: Arrays
    provenance: Provenance
    ours: bool
    folder: Path | None


def merge(
    run: Path | str,
    *,
    out: Path | str,
    full: bool = False,
    onnx: bool = False,
    model: str | Path | None = None,
    labels: Sequence[str] | Path | None = None,
    task: str | None = None,
    version: int | None = None,
    artifact: Path | str | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> Path:
    """Write the adapter of ``run`` to ``out`` as a PEFT folder or, with ``full`` or ``onnx``, merged into its model.

    Merging is done in float32; the model is saved in its checkpoint's dtype. What has no adapter stays as it is, to the
    bit, and the merged model answers as model and adapter do, or nothing is written.

    Args:
        run: a folder made by train, aggregate or demo, also while it works, or a PEFT adapter folder.
        out: folder to write: a new one, an empty one, or what an earlier merge wrote.
        full: load the original model with torch, merge, and save it with its tokenizer.
        onnx: as ``full``, but write ``model.onnx`` in float32, with configuration and tokenizer, which onnxruntime runs alone.
        model: the original model, if it is no longer where ``adapter_config.json`` says.
        labels: names of the classes, or a file of them as for export, in place of those that the run knows.
        task: as for export, where neither the run nor its model says what the model is for.
        version: of an aggregator's run, in place of its last.
        artifact: of an aggregator's run that has no adapter yet, or to compare any adapter with.
        on_progress: called with a line at each stage.

    Raises:
        ArtifactError: no adapter there, or one that is damaged (all problems listed).
        ConfigError: no such version or task, an ``out`` with files in it that are not a merge's, or what only a merged
            model has without ``full``.
        ExportError: the original model is not to be had, is another one, or cannot be merged exactly.
    """
    if full and onnx:
        raise ConfigError("give --full or --onnx, got both")
    full = full or onnx
    if not full and (model, labels, task) != (None, None, None):
        raise ConfigError(
            "--model, --labels and --task are for a merged model; give --full or --onnx as well"
        )
    given = _open(Path(run), version, artifact)
    if problems := [*_problems(given)]:
        raise ArtifactError(f"{given.where}: {some(problems, by='; ')}")
    say, out = on_progress or log.info, Path(out)
    refuse_overlap(out, Path(run), given.where, run_folder(Path(run)) / ADAPTER)
    if not full:
        with new_folder(out) as part:
            _write_adapter(part, given)
        return out
    recorded = str(given.config.get("base_model_name_or_path") or "")
    source = find_model(model, recorded, given.provenance.origin, ours=given.ours)
    refuse_overlap(out, Path(source[0]))
    from fleetune.toolkit.merged_model import Source, write_merged

    with new_folder(out) as part, TemporaryDirectory() as spare:
        if given.folder is None:
            write_peft(Path(spare), given.config, given.arrays)
        write_merged(
            part,
            given.folder or Path(spare),
            given.provenance,
            source=Source(*source),
            labels=labels,
            task=task,
            say=say,
            onnx=onnx,
        )
    return out


def _open(run: Path, version: int | None, artifact: Path | str | None) -> Given:
    inner = run_folder(run)
    has_adapter = (inner / ADAPTER / CONFIG).is_file()
    if version is None and (has_adapter or not (inner / LEDGER).is_file()):
        given = _open_folder(find_adapter(run))
        if artifact is None:
            return given
        return given._replace(provenance=provenance_of(open_artifact(artifact, verify=False).manifest))
    kept = read_version(inner, version)
    if artifact is None and not has_adapter:
        raise ConfigError(
            f"{inner}: has version {kept.version} and no {ADAPTER}/ yet; give --artifact as well"
        )
    arrays = parse_arrays(kept.content)
    if artifact is None:
        beside = _open_folder(inner / ADAPTER)
        shapes = {name: array.shape for name, array in beside.arrays.items()}
        known = msgspec.structs.replace(beside.provenance, tensors=beside.provenance.tensors or shapes)
        return Given(inner, beside.config, arrays, known, ours=True, folder=None)
    opened = open_artifact(artifact, verify=False)
    if opened.digest != kept.artifact:
        raise ConfigError(f"{artifact}: not the artifact of the job in {inner}")
    return Given(inner, opened.manifest.peft, arrays, provenance_of(opened.manifest), ours=True, folder=None)


def _open_folder(folder: Path) -> Given:
    config, arrays = read_peft(folder)
    provenance, run = read_provenance(folder), folder.parent
    if not provenance.labels:
        provenance = msgspec.structs.replace(provenance, labels=labels_of_run(run))
    ours = bool(provenance.tensors) or (folder.name == ADAPTER and (run / RUN).is_file())
    return Given(folder, config, arrays, provenance, ours=ours, folder=folder)


def _problems(given: Given) -> Iterator[str]:
    """What in the tensors contradicts what is known of them: what was exported or, for others' adapters, little."""
    config, arrays = given.config, given.arrays
    if config.get("peft_type") != "LORA":
        yield f"{CONFIG}: expected a LoRA configuration, got {str(config)[:80]}"
        return
    if not arrays:
        yield "no tensors"
    yield from (
        f"{name}: holds NaN or infinity"
        for name, value in sorted(arrays.items())
        if not np.isfinite(value).all()
    )
    if given.provenance.tensors:
        yield from _differences(arrays, given.provenance.tensors)
    else:
        yield from _unpaired(arrays)


def _differences(arrays: Arrays, wanted: dict[str, tuple[int, ...]]) -> Iterator[str]:
    yield from (f"{name}: not in the artifact" for name in sorted(arrays.keys() - wanted))
    yield from (f"{name}: missing" for name in sorted(wanted.keys() - arrays))
    for name in sorted(wanted.keys() & arrays):
        if arrays[name].shape != wanted[name]:
            yield f"{name}: expected shape {list(wanted[name])}, got {list(arrays[name].shape)}"


def _unpaired(arrays: Arrays) -> Iterator[str]:
    for first, second in _SIDES.items():
        modules = {n.removesuffix(s) for n in arrays for s in (first, second) if n.endswith(s)}
        for module in sorted(modules):
            a, b = arrays.get(module + first), arrays.get(module + second)
            if a is None or b is None:
                yield f"{module}: {first} without {second} or the reverse"
            elif a.ndim == b.ndim == 2 and a.shape[0] != b.shape[1]:
                yield f"{module}: shapes {list(a.shape)} and {list(b.shape)} do not fit each other"


def _write_adapter(part: Path, given: Given) -> None:
    write_peft(part, given.config, given.arrays)
    write_provenance(part, given.provenance, card=adapter_card(_named(given)))
    for path in _beside(given.folder):
        shutil.copyfile(path, part / path.name)


def _named(given: Given) -> Provenance:
    recorded = str(given.config.get("base_model_name_or_path") or "")
    return msgspec.structs.replace(given.provenance, model=recorded)


def _beside(folder: Path | None) -> Iterable[Path]:
    found = [path for pattern in _BESIDE for path in folder.glob(pattern)] if folder else []
    return [path for path in found if path.is_file()]
