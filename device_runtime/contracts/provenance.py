"""What an adapter folder says of itself beside PEFT's own files: ``fleetune.json`` for programs, a model card for people."""

from pathlib import Path

import msgspec

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.manifest import Manifest, Origin, ProblemType
from fleetune.device_runtime.files import doing, read_json

PROVENANCE = "fleetune.json"
CARD = "README.md"
_PIPELINES = {
    "sequence-classification": "text-classification",
    "token-classification": "token-classification",
    "causal-lm": "text-generation",
    "image-classification": "image-classification",
    "audio-classification": "audio-classification",
}
"""How the hub calls a task."""
_LICENCE_UNKNOWN = "not stated"


class Provenance(msgspec.Struct, frozen=True, kw_only=True):
    """Where an adapter, or a model with one merged in, comes from; what nobody knows is empty."""

    task: str = ""
    architecture: str = ""
    """Class of transformers."""
    labels: tuple[str, ...] = ()
    """Names of the classes, by their numbers; of a regression those of its outputs."""
    problem_type: ProblemType = ""
    model: str = ""
    """As PEFT's ``base_model_name_or_path``."""
    licence: str = ""
    """Of that model."""
    origin: Origin = Origin()
    tensors: dict[str, tuple[int, ...]] = {}
    """Shapes of the adapter's tensors."""


def provenance_of(manifest: Manifest) -> Provenance:
    """Return the provenance of every adapter of an artifact."""
    return Provenance(
        task=manifest.task,
        architecture=manifest.architecture,
        labels=manifest.labels,
        problem_type=manifest.problem_type,
        model=manifest.peft.get("base_model_name_or_path") or "",
        licence=manifest.licences.get("model", ""),
        origin=manifest.origin,
        tensors={t.name: t.shape for t in manifest.trainable},
    )


def write_provenance(folder: Path, provenance: Provenance, *, card: str) -> None:
    """Write both files into ``folder``; StateError if they cannot be written."""
    with doing("written", folder):
        write_atomically(folder / CARD, card.encode())
        write_atomically(folder / PROVENANCE, msgspec.json.encode(provenance) + b"\n")


def read_provenance(folder: Path) -> Provenance:
    """Read ``fleetune.json``; empty if there is none, as in a folder that others wrote, or one before 0.2.

    Raises:
        ArtifactError: the file cannot be read.
    """
    return read_json(folder / PROVENANCE, Provenance) or Provenance()


def adapter_card(provenance: Provenance) -> str:
    """Return the model card of a PEFT folder."""
    return (
        _head(provenance, {"library_name": "peft", "tags": ["lora", "fleetune"]})
        + f"# LoRA of `{_model(provenance)}`\n\n"
        + _facts(provenance)
        + f"\n```python\n{_loading(provenance)}```\n"
    )


def merged_card(provenance: Provenance, *, library: str = "transformers") -> str:
    """Return the model card of a model with an adapter merged in, for the library that loads it."""
    return (
        _head(provenance, {"library_name": library, "tags": ["fleetune"]})
        + f"# `{_model(provenance)}`, with a LoRA merged in\n\n"
        + _facts(provenance)
    )


def _head(provenance: Provenance, more: dict[str, object]) -> str:
    """Front matter; every value is JSON, which YAML takes."""
    rows = dict(more)
    if provenance.origin.kind == "hub":
        rows["base_model"] = provenance.model
    if provenance.task in _PIPELINES:
        rows["pipeline_tag"] = _PIPELINES[provenance.task]
    lines = [f"{name}: {_quoted(value)}\n" for name, value in sorted(rows.items())]
    return f"---\n{''.join(lines)}---\n\n"


def _facts(provenance: Provenance) -> str:
    rows = {
        "Task": provenance.task,
        "Problem type": provenance.problem_type,
        "Class": provenance.architecture,
        "Licence of the model": provenance.licence if provenance.licence != _LICENCE_UNKNOWN else "",
        "Labels": ", ".join(f"{i} `{name}`" for i, name in enumerate(provenance.labels)),
    }
    return "".join(f"- {name}: {value}\n" for name, value in rows.items() if value)


def _loading(provenance: Provenance) -> str:
    """Lines of Python that load a PEFT folder whole: PEFT alone does not know how many classes there are."""
    given, named = "", ""
    if provenance.labels:
        named = f"labels = {_quoted(list(provenance.labels))}\n"
        given = (
            ", num_labels=len(labels), id2label=dict(enumerate(labels)),"
            " label2id={name: i for i, name in enumerate(labels)}, ignore_mismatched_sizes=True"
        )
        given += f', problem_type="{provenance.problem_type}"' if provenance.problem_type else ""
    return (
        "import peft, transformers\n\n"
        f"{named}"
        f"model = transformers.{provenance.architecture or 'AutoModel'}.from_pretrained({_quoted(_model(provenance))}{given})\n"
        'model = peft.PeftModel.from_pretrained(model, ".")\n'
    )


def _model(provenance: Provenance) -> str:
    return provenance.model or "MODEL"


def _quoted(value: object) -> str:
    return msgspec.json.encode(value).decode()
