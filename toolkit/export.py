"""``fleetune export``: a Hugging Face model with LoRA becomes a training artifact."""

import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fleetune.device_runtime.contracts.adapters import CONFIG as ADAPTER_CONFIG
from fleetune.device_runtime.contracts.manifest import Manifest, ProblemType
from fleetune.device_runtime.errors import ConfigError, ExportError, choices
from fleetune.exporters.assembly import Description, check_place
from fleetune.exporters.storages import ANSWERS_OF_ANY_KIND, check_base_dtype
from fleetune.toolkit.labels import HAS_CLASSES, choose_labels, choose_problem, name_outputs, read_labels
from fleetune.toolkit.sources import (
    CONFIG,
    check_adapter_source,
    check_hub,
    check_source,
    config_of,
)

__all__ = ["ExportReport", "export", "read_labels"]
log = logging.getLogger(__name__)


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and how large it is.

    ``notes`` say what holds where model, tokenizer, adapter and settings differ, and what Hugging Face warned of, a line each.
    """

    out: str
    name: str
    architecture: str
    task: str
    num_layers: int
    num_kinds: int
    base_bytes: int
    adapter_bytes: int
    graph_bytes: int
    seconds: float
    notes: list[str] = []


def export(
    model: str | Path,
    *,
    task: str,
    out: str | Path,
    num_labels: int | None = None,
    labels: Sequence[str] | str | Path | None = None,
    problem_type: str | None = None,
    adapter: str | Path | None = None,
    lora_r: int = 8,
    lora_alpha: int = 16,
    target_modules: str | Sequence[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    backend: str = "onnx",
    base_dtype: str = "fp32",
    max_length: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
    on_note: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export ``model`` as a training artifact.

    Args:
        model: a local folder or a hub id.
        task: sequence-classification, token-classification, causal-lm, image-classification or audio-classification.
        out: the artifact's folder; an artifact already there is replaced.
        num_labels: how many classes; or name them with ``labels``. With neither, the classes that the checkpoint names.
        labels: class names, or a file of them: a JSON list, or one a line. Of a regression, names of its outputs.
        problem_type: ``single_label_classification``, ``multi_label_classification`` (any of the labels) or ``regression``
            (numbers); None for the checkpoint's, if it has as many outputs as are asked for, else one class a row.
        adapter: an existing PEFT adapter to go on from, instead of fresh LoRA.
        lora_r: rank of fresh LoRA.
        lora_alpha: its scale is ``lora_alpha / lora_r``.
        target_modules: names of the linears that get LoRA (a list, or ``a,b``), ``all-linear``, or a regular expression that
            whole module names match; None = peft's choice for the architecture.
        use_rslora: scale fresh LoRA by ``lora_alpha / sqrt(lora_r)`` (rsLoRA, arXiv 2312.03732).
        use_dora: learn each row's magnitude beside its direction (DoRA, arXiv 2402.09353).
        backend: which runtime the graphs are for.
        base_dtype: storage of the frozen weights: fp32, fp16 (computed in fp32), int8 (the blocks' matrices computed as int8) or
            int4 (computed in fp32).
        max_length: longest sequence in tokens; at most the model's. Of a model of sound the values of a recording, one second
            without it.
        seed: of fresh LoRA and a fresh head.
        on_progress: called with a line at each stage.
        on_note: called with each note of the report as it comes up; by default they are logged as warnings.

    Raises:
        ConfigError: an unknown task or backend, or labels that are missing or doubled.
        ExportError: the model cannot be loaded or exported; says where and why.
    """
    say = on_progress or log.info
    started = time.monotonic()
    source, notes = str(model), _Notes(on_note or log.warning)
    check_source(source)
    if adapter is not None:
        check_adapter_source(str(adapter))
    check_place(Path(out))
    _check_numbers(lora_r=lora_r, lora_alpha=lora_alpha, max_length=max_length)
    check_base_dtype(base_dtype, backend=backend)
    has_classes = HAS_CLASSES[task]
    check_hub(source, CONFIG)
    if adapter is not None:
        check_hub(str(adapter), ADAPTER_CONFIG)
    problem = _problem_type(
        problem_type, labels, num_labels, task=task, backend=backend, source=source, tell=notes.tell
    )
    if problem == "regression":
        names = name_outputs(labels, num_labels)
    else:
        names = _classes(labels, num_labels, source=source, has_classes=has_classes, tell=notes.tell)
    # From here on torch is loaded: a slip of the pen is told before that.
    from fleetune.exporters.writing import write_artifact
    from fleetune.toolkit.lora import adapter_names, attach_lora, continue_adapter
    from fleetune.toolkit.models import ends_of, licence_of, load_checkpoint, preprocessor_of
    from fleetune.toolkit.origin import origin_of, parameter_digests
    from fleetune.toolkit.programs import describe, program_of
    from fleetune.toolkit.tasks import WITHOUT_TEXT

    say(f"loading {source}")
    checkpoint = load_checkpoint(
        source,
        task=task,
        labels=names,
        seed=seed,
        problem_type=problem,
        tell=notes.tell,
        aside=next(parent for parent in Path(out).absolute().parents if parent.is_dir()),
    )
    digests = parameter_digests(checkpoint.model)
    if adapter is not None:
        learning = continue_adapter(
            checkpoint.model,
            str(adapter),
            task=task,
            fresh=checkpoint.fresh,
            tell=notes.tell,
        )
    else:
        learning = attach_lora(
            checkpoint.model,
            task=task,
            r=lora_r,
            alpha=lora_alpha,
            target_modules=target_modules,
            use_rslora=use_rslora,
            use_dora=use_dora,
            fresh=checkpoint.fresh,
            tell=notes.tell,
        )
    loaded = describe(
        learning, checkpoint.tokenizer, task=task, source=source, max_length=max_length, tell=notes.tell
    )
    description = Description(
        name=Path(source).name or source,
        architecture=loaded.architecture,
        task=task,
        labels=tuple(names),
        peft=loaded.peft_config,
        tokenizer=loaded.tokenizer,
        pad_id=loaded.pad_id,
        max_length=loaded.max_length,
        truncation_side=loaded.truncation_side,
        chat_template=loaded.chat_template,
        special_tokens=dict(loaded.special_tokens),
        positions=loaded.positions,
        origin=origin_of(source, digests, adapter_names(learning).values(), seed=seed),
        licences={"model": licence_of(source)},
        preprocessor=preprocessor_of(source) if task in WITHOUT_TEXT else None,
        ends=None if has_classes else ends_of(learning, checkpoint.tokenizer),
        problem_type=problem,
    )
    manifest = write_artifact(
        program_of(loaded, task=task),
        description,
        Path(out),
        backend=backend,
        base_dtype=base_dtype,
        on_progress=say,
    )
    return _report(manifest, Path(out), time.monotonic() - started, notes.lines)


class _Notes:
    """What is told in the course of an export."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.lines: list[str] = []
        self._say = say

    def tell(self, note: str) -> None:
        self.lines.append(note)
        self._say(note)


def _check_numbers(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: expected 1 or more")


def _problem_type(
    given: str | None,
    labels: Sequence[str] | str | Path | None,
    num_labels: int | None,
    *,
    task: str,
    backend: str,
    source: str,
    tell: Callable[[str], None],
) -> ProblemType:
    num_asked = num_labels
    if labels is not None and num_labels is None:
        num_asked = len(name_outputs(labels, None))
    found = choose_problem(given, task=task, num_labels=num_asked, config=config_of(source), tell=tell)
    if found and backend not in ANSWERS_OF_ANY_KIND:
        raise ExportError(
            f"--problem-type {found}: backend {backend} trains one class a row; use {choices(ANSWERS_OF_ANY_KIND)}"
        )
    return found


def _classes(
    labels: Sequence[str] | str | Path | None,
    num_labels: int | None,
    *,
    source: str,
    has_classes: bool,
    tell: Callable[[str], None],
) -> list[str]:
    if has_classes:
        return choose_labels(labels, num_labels, config=config_of(source), tell=tell)
    if labels is not None or num_labels is not None:
        tell("labels: the task has none; --labels and --num-labels are not used")
    return []


def _report(manifest: Manifest, out: Path, seconds: float, notes: list[str]) -> ExportReport:
    size = {name: digest.size_bytes for name, digest in manifest.files.items()}
    return ExportReport(
        out=str(out),
        name=manifest.name,
        architecture=manifest.architecture,
        task=manifest.task,
        num_layers=manifest.num_layers,
        num_kinds=len(manifest.kinds),
        base_bytes=size["base.safetensors"],
        adapter_bytes=size["adapter.safetensors"],
        graph_bytes=sum(n for name, n in size.items() if name.startswith("graphs/")),
        seconds=round(seconds, 2),
        notes=notes,
    )
