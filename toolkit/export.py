"""``fleetune export``: a Hugging Face model with LoRA becomes a training artifact."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.errors import ConfigError
from fleetune.exporters.backends import BACKENDS
from fleetune.exporters.model.quantize import check_base_dtype
from fleetune.exporters.writing import Description, write_artifact
from fleetune.toolkit.lora import adapter_names, attach_lora, load_adapter
from fleetune.toolkit.models import licence_of, load_model
from fleetune.toolkit.origin import origin_of, parameter_digests
from fleetune.toolkit.programs import describe, program_of
from fleetune.toolkit.tasks import TASKS

log = logging.getLogger(__name__)


class ExportReport(msgspec.Struct, frozen=True, kw_only=True):
    """What was written, and how large it is."""

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


def export(
    model: str | Path,
    *,
    task: str,
    out: str | Path,
    num_labels: int | None = None,
    labels: Sequence[str] | str | Path | None = None,
    adapter: str | Path | None = None,
    lora_r: int = 8,
    lora_alpha: int = 16,
    target_modules: Sequence[str] | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
    backend: str = "onnx",
    base_dtype: str = "fp32",
    max_length: int | None = None,
    seed: int = 0,
    on_progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Export ``model`` as a training artifact.

    Args:
        model: a local folder or a hub id.
        task: sequence-classification, token-classification, causal-lm or image-classification.
        out: the artifact's folder; an artifact already there is replaced.
        num_labels: how many classes; or name them with ``labels``.
        labels: class names, or a file of them: a JSON list, or one a line.
        adapter: an existing PEFT adapter to go on from, instead of fresh LoRA.
        lora_r: rank of fresh LoRA.
        lora_alpha: its scale is ``lora_alpha / lora_r``.
        target_modules: names of the linears that get LoRA; None = peft's choice for the architecture.
        use_rslora: scale fresh LoRA by ``lora_alpha / sqrt(lora_r)`` (rsLoRA, arXiv 2312.03732).
        use_dora: learn each row's magnitude beside its direction (DoRA, arXiv 2402.09353).
        backend: which runtime the graphs are for.
        base_dtype: storage of the frozen weights: fp32, fp16 (computed in fp32) or int8 (the blocks' matrices, computed as int8).
        max_length: longest sequence in tokens; at most the model's.
        seed: of fresh LoRA and a fresh head.
        on_progress: called with a line at each stage.

    Raises:
        ConfigError: an unknown task or backend, or labels that are missing or doubled.
        ExportError: the model cannot be loaded or exported; says where and why.
    """
    say = on_progress or log.info
    started = time.monotonic()
    chosen = TASKS[task]
    check_base_dtype(base_dtype, backend=backend, taken=BACKENDS[backend].base_dtypes)
    if lora_r < 1:
        raise ConfigError(f"--lora-r {lora_r}: expected 1 or more")
    names = read_labels(labels, num_labels) if chosen.has_classes else []
    say(f"loading {model}")
    plain, tokenizer = load_model(str(model), task=task, labels=names, seed=seed)
    digests = parameter_digests(plain)
    if adapter is not None:
        learning = load_adapter(plain, str(adapter))
    else:
        learning = attach_lora(
            plain,
            task=task,
            r=lora_r,
            alpha=lora_alpha,
            target_modules=target_modules,
            use_rslora=use_rslora,
            use_dora=use_dora,
        )
    loaded = describe(learning, tokenizer, task=task, source=str(model), max_length=max_length)
    description = Description(
        name=Path(str(model)).name or str(model),
        architecture=loaded.architecture,
        task=task,
        labels=tuple(names),
        peft=loaded.peft_config,
        tokenizer=loaded.tokenizer,
        pad_id=loaded.pad_id,
        max_length=loaded.max_length,
        origin=origin_of(str(model), digests, adapter_names(learning).values(), seed=seed),
        licences={"model": licence_of(str(model))},
    )
    manifest = write_artifact(
        program_of(loaded, task=task),
        description,
        Path(out),
        backend=backend,
        base_dtype=base_dtype,
        on_progress=say,
    )
    return _report(manifest, Path(out), time.monotonic() - started)


def read_labels(labels: Sequence[str] | str | Path | None, num_labels: int | None) -> list[str]:
    """Class names from a list, a file or a count.

    Raises:
        ConfigError: neither given, both but different, doubled names, fewer than two, or an unreadable file.
    """
    if labels is None and num_labels is None:
        raise ConfigError("give --num-labels N or --labels FILE")
    if labels is None:
        names = [f"label_{i}" for i in range(num_labels or 0)]
    else:
        names = _from_file(Path(labels)) if isinstance(labels, (str, Path)) else [str(n) for n in labels]
    if num_labels is not None and len(names) != num_labels:
        raise ConfigError(f"--num-labels {num_labels}, but {len(names)} labels are named")
    if len(names) < 2 or len(set(names)) != len(names):
        raise ConfigError(
            f"{len(names)} labels, {len(set(names))} of them distinct: expected two or more, each once"
        )
    return names


def _from_file(path: Path) -> list[str]:
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: labels cannot be read: {exc}") from exc
    if not text.lstrip().startswith("["):
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        return [str(name) for name in json.loads(text)]
    except ValueError as exc:
        raise ConfigError(f"{path}: neither a JSON list nor one label a line: {exc}") from exc


def _report(manifest: Manifest, out: Path, seconds: float) -> ExportReport:
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
    )
