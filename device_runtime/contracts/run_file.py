"""The folder of a run: what lies in it under which name, and ``run.json``, which says what was run and what it came to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.arrays import write_atomically
from fleetune.device_runtime.contracts.adapters import CONFIG
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.errors import ArtifactError
from fleetune.device_runtime.files import doing, read_json

RUN = "run.json"
ADAPTER = "adapter"
"""PEFT folder."""
CHECKPOINT = "checkpoint.safetensors"
"""Of ``train``."""
BEST = "best.safetensors"
"""Of ``train`` that is measured while it trains: its evaluations, and the adapter of the lowest loss."""
LEDGER = "ledger.sqlite"
"""Of ``aggregate``."""
CHOICES = "choices.jsonl"
"""Of ``aggregate`` with a configurator that chooses: what each device was asked in each round, why, and what it brought."""
TRAFFIC = "traffic.jsonl"
"""Of ``aggregate``: every byte by round, device, direction and kind."""
ROUNDS = "rounds.jsonl"
"""Of ``simulate``."""
EVALUATION, EVALUATION_CSV, EVALUATIONS = "evaluation.json", "evaluation.csv", "evaluations.jsonl"
"""The last evaluation, its classes as a table, and a line for each; of ``train``, ``predict`` and an evaluating ``device``."""
_INNER = "run"
"""Where a demo has the run of its aggregator."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """Content of the file."""

    artifact: str
    artifact_digest: str
    arguments: dict[str, Any]
    """As :func:`plain` has them."""
    report: msgspec.Struct
    labels: tuple[str, ...] = ()
    """Names of the artifact's classes."""


class _LabelsOnly(msgspec.Struct):
    labels: tuple[str, ...] = ()


class _Length(msgspec.Struct, frozen=True):
    seq_len: int = 0


class _Arguments(_Length, frozen=True):
    """With ``work`` nested, or flat as 0.1.0 had it."""

    work: _Length = _Length()


class _ArgumentsOnly(msgspec.Struct):
    arguments: _Arguments = _Arguments()


def plain(arguments: Mapping[str, object]) -> dict[str, Any]:
    """Arguments as JSON has them: structs are objects, paths are text, callbacks (``on_…``) are left out."""
    kept = {name: value for name, value in arguments.items() if not name.startswith("on_")}
    found: dict[str, Any] = msgspec.to_builtins(kept, enc_hook=str)
    return found


def write_run(folder: Path, artifact: Artifact, arguments: dict[str, Any], report: msgspec.Struct) -> None:
    """Write ``run.json`` into ``folder``; StateError if it cannot be written, and the one before stays."""
    run = Run(
        artifact=artifact.manifest.name,
        artifact_digest=artifact.digest,
        arguments=arguments,
        report=report,
        labels=artifact.manifest.labels,
    )
    with doing("written", folder / RUN):
        write_atomically(folder / RUN, msgspec.json.format(msgspec.json.encode(run), indent=1))


def run_folder(run: Path) -> Path:
    """Return where train or aggregate wrote: ``run`` itself, or the run inside the folder of a demo."""
    inner = run / _INNER
    return inner if inner.is_dir() and not (run / ADAPTER).is_dir() else run


def find_adapter(run: Path) -> Path:
    """Return the PEFT folder of a run of train, aggregate or demo; ``run`` itself, if it is one.

    Raises:
        ArtifactError: no adapter there.
    """
    for folder in (run_folder(run) / ADAPTER, run):
        if (folder / CONFIG).is_file():
            return folder
    named = sorted(
        path.parent for path in run.glob(f"*/{CONFIG}")
    )  # PEFT saves an adapter with a name into a folder of it
    hint = f"{named[0]}, or " if named else ""
    raise ArtifactError(
        f"{run}: no adapter here (no {ADAPTER}/{CONFIG}); give {hint}the --out folder of train, aggregate or demo"
    )


def read_labels(folder: Path) -> tuple[str, ...]:
    """Names of the classes that the run in ``folder`` was about; empty if no run was there, or one before 0.2.

    Raises:
        ArtifactError: the file cannot be read.
    """
    found = read_json(folder / RUN, _LabelsOnly)
    return found.labels if found else ()


def read_seq_len(folder: Path) -> int:
    """Longest sequence in tokens that the run in ``folder`` read; 0 if no run was there.

    Raises:
        ArtifactError: the file cannot be read.
    """
    found = read_json(folder / RUN, _ArgumentsOnly)
    return found.arguments.work.seq_len or found.arguments.seq_len if found else 0
