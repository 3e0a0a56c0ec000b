"""What a run of ``fleetune train`` came to."""

import statistics
from collections.abc import Sequence
from pathlib import Path

import msgspec

from fleetune.device_runtime.commands.peak_memory import peak_rss_mb
from fleetune.device_runtime.contracts.evaluation_file import FIGURES, Evaluated
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.run_file import RUN
from fleetune.device_runtime.prepared import prepared
from fleetune.device_runtime.rules.gate import Gate
from fleetune.device_runtime.training.early_stopping import Row
from fleetune.device_runtime.training.trainer import Trainer


class TrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a run came to. Losses are of each step's batch, before its update."""

    steps: int
    step_ms_median: float
    peak_rss_mb: float
    """Largest resident memory of the process so far, in 2**20 bytes."""
    loss_first: float
    loss_last: float
    accuracy: float | None
    """On ``eval`` at full depth; None without it, and where a row's label is not one class."""
    eval_loss: float | None
    balanced_accuracy: float | None = None
    """On ``eval``, as ``macro_f1``; None without it, and where the task has no classes. By class: ``evaluation.json``."""
    macro_f1: float | None = None
    perplexity: float | None = None
    """On ``eval``, of a language model."""
    micro_f1: float | None = None
    """On ``eval``, of label sets, as ``exact_match``."""
    exact_match: float | None = None
    mae: float | None = None
    """On ``eval``, of a regression, as ``r2`` and ``pearson``; its mean squared error is ``eval_loss``."""
    r2: float | None = None
    pearson: float | None = None
    mean_active_layers: float
    num_samples: int
    """That train."""
    memory_plan: dict[str, int | bool | None]
    """Of :class:`fleetune.device_runtime.contracts.memory_plan.MemoryPlan`."""
    losses: list[float]
    pauses: int
    """Times at which the rules forbade the next step, in this process."""
    paused_s: float
    adapter: str
    """PEFT folder."""
    epsilon: float | None = None
    """Of one sample, at delta 1e-5, of what the adapter tells; None where nothing hides samples. Losses have no noise."""
    evaluations: list[Row] = []
    """Those before the end, and at it; none without ``eval_every`` or ``patience``."""
    best_step: int | None = None
    """Steps behind the adapter that is kept, where it is that of the lowest loss; None where it is the last."""


class _Measured(msgspec.Struct):
    peak_rss_mb: float
    pauses: int
    paused_s: float


class _Recorded(msgspec.Struct):
    report: _Measured


def report_of(
    trainer: Trainer,
    evaluation: Evaluated | None,
    *,
    rows: Sequence[Row] = (),
    best_step: int | None = None,
    gate: Gate,
    memory: MemoryPlan,
    num_samples: int,
    adapter: Path,
    epsilon: float | None = None,
) -> TrainReport:
    """Make the report of a trainer that has taken its steps."""
    history = trainer.history
    return TrainReport(
        steps=trainer.step_index,
        step_ms_median=1e3 * statistics.median(r.seconds for r in history),
        peak_rss_mb=peak_rss_mb(),
        loss_first=history[0].loss,
        loss_last=history[-1].loss,
        **_evaluated(evaluation),
        mean_active_layers=statistics.fmean(r.active_layers for r in history),
        num_samples=num_samples,
        evaluations=list(rows),
        best_step=best_step,
        memory_plan=memory._asdict(),
        losses=[r.loss for r in history],
        pauses=gate.num_pauses,
        paused_s=gate.paused_s,
        adapter=str(adapter),
        epsilon=epsilon,
    )


def _evaluated(evaluation: Evaluated | None) -> dict[str, float | None]:
    """What was found, by the fields of the report."""
    names = {name: "eval_loss" if name == "loss" else name for name in FIGURES}
    return {own: getattr(evaluation, name, None) for name, own in names.items()}


def as_measured(report: TrainReport, folder: Path) -> TrainReport:
    """Put in what only the process that took the steps could measure, of the record that it left in ``folder``."""
    try:
        kept = msgspec.json.decode((folder / RUN).read_bytes(), type=prepared(_Recorded)).report
    except (OSError, msgspec.MsgspecError):
        return report
    return msgspec.structs.replace(report, **msgspec.structs.asdict(kept))
