"""What the figures of benchmarks/ are measured on: a few models by name, each as a folder and as an artifact."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks.measuring.processes import run_worker
from fleetune.device_runtime.tables import Table
from fleetune.toolkit.export import export
from fleetune.toolkit.models import packaged_model

NUM_LABELS = 77
"""As banking77 has."""


class Subject(NamedTuple):
    """How a model is come by: ``worker`` of benchmarks/workers writes it; without one it is the packaged MiniLM."""

    worker: str = ""
    task: str = "sequence-classification"
    words: tuple[str, ...] = ()
    """Of the worker, before the folder."""


SUBJECTS = Table(
    "model",
    {
        "minilm": Subject(),
        "bert": Subject("make_bert"),
        "stories": Subject("make_stories", task="causal-lm"),
        "llama": Subject("make_llama", task="causal-lm"),
        "135m": Subject("make_language_model", "causal-lm", ("135m",)),
        "0.5b": Subject("make_language_model", "causal-lm", ("0.5b",)),
    },
)


def model_of(name: str, root: Path) -> Path:
    """Folder of a model; one that has to be written is written below ``root``, once.

    Raises:
        UnknownName: there is no such model.
        ConfigError: it cannot be made here; says why.
    """
    subject = SUBJECTS[name]
    if not subject.worker:
        return packaged_model()
    folder = root / f"{name}-model"
    if not folder.exists():
        run_worker(subject.worker, *subject.words, folder, threads=1)
    return folder


def artifact_of(name: str, root: Path, *, say: Callable[[str], None], base_dtype: str = "fp32") -> Path:
    """Folder of a model's artifact below ``root``, with LoRA as ``fleetune export`` makes it; errors as of :func:`model_of`."""
    task, out = SUBJECTS[name].task, root / f"{name}-{base_dtype}"
    export(
        model_of(name, root),
        task=task,
        num_labels=None if task == "causal-lm" else NUM_LABELS,
        base_dtype=base_dtype,
        out=out,
        on_progress=say,
    )
    return out
