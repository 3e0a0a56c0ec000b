"""Figures of a run as they come, for TensorBoard, MLflow or Weights & Biases; each library is imported when it is asked for."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from fleetune.broker.store.rows import Row
from fleetune.device_runtime.contracts.evaluation_file import Evaluated
from fleetune.device_runtime.contracts.scores import SCORES
from fleetune.device_runtime.errors import ConfigError, FleetuneError, lacking, one_line
from fleetune.device_runtime.tables import Table
from fleetune.device_runtime.training.step_reports import StepReport

log = logging.getLogger(__name__)

EVENTS = "events"
"""Folder of TensorBoard's files, in that of the run."""


class Tracker(NamedTuple):
    """An open run of a tracker."""

    log: Callable[[int, Mapping[str, float]], object]
    """Takes a step, or a round, and figures by name."""
    close: Callable[[], object]


@contextmanager
def tracking(name: str, out: Path) -> Iterator[Callable[[object], None]]:
    """Open a tracker, and yield what takes a run's reports: of steps, of rounds, of evaluations; anything else passes by.

    A tracker that fails later is a warning, and is told no more: the run goes on.

    Args:
        name: one of TRACKERS.
        out: folder of the run; its name is the run's.

    Raises:
        UnknownName: no such tracker; lists what there is.
        ConfigError: its library is not installed, or cannot be begun.
    """
    make = TRACKERS[name]
    try:
        tracker: Tracker | None = make(out)
    except FleetuneError:
        raise
    except Exception as exc:
        raise ConfigError(f"{name} cannot be logged to: {one_line(exc)}") from exc

    def tell(act: Callable[[Tracker], object]) -> None:
        nonlocal tracker
        try:
            if tracker:
                act(tracker)
        except Exception as exc:  # noqa: BLE001 - whatever a stranger's server does, the run goes on
            tracker = None
            log.warning("%s is logged to no more: %s", name, one_line(exc))

    def take(report: object) -> None:
        step, figures = figures_of(report)
        if figures:
            tell(lambda open_one: open_one.log(step, figures))

    try:
        yield take
    finally:
        tell(lambda open_one: open_one.close())


def figures_of(report: object) -> tuple[int, dict[str, float]]:
    """Step or round, and finite figures by name, of a report; none of anything else."""
    if isinstance(report, StepReport):
        return report.step + 1, {"train/loss": report.loss, "train/step_ms": 1e3 * report.seconds}
    if isinstance(report, Evaluated):
        return report.place, {f"eval/{name}": value for name, value in report.figures().items()}
    if isinstance(report, Row):
        found = {"eval/loss": report.loss, "train/loss": report.train_loss}
        found |= {f"eval/{name}": getattr(report, name) for name in SCORES}
        found |= {"bytes/down": report.bytes_down, "bytes/up": report.bytes_up}
        return report.round, {name: value for name, value in found.items() if value is not None}
    return 0, {}


def _tensorboard(out: Path) -> Tracker:
    """Events below ``out``; those of the same steps, from before a kill, are hidden by the newer ones."""
    writer_of = _library("tensorboardX", extra="tensorboard").SummaryWriter
    writer: Any = None

    def write(step: int, figures: Mapping[str, float]) -> None:
        nonlocal writer
        writer = writer or writer_of(str(out / EVENTS), purge_step=step)
        for name, value in figures.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, lambda: writer and writer.close())


def _mlflow(out: Path) -> Tracker:
    """A run at the server of MLFLOW_TRACKING_URI; MLFLOW_RUN_ID names one to go on with."""
    mlflow = _library("mlflow", extra="mlflow")
    mlflow.start_run(run_name=out.name)
    return Tracker(lambda step, figures: mlflow.log_metrics(dict(figures), step=step), mlflow.end_run)


def _wandb(out: Path) -> Tracker:
    """A run of WANDB_PROJECT, with neither the console nor the code; WANDB_RUN_ID and WANDB_RESUME name one to go on with."""
    wandb = _library("wandb", extra="wandb")
    settings = wandb.Settings(console="off", disable_git=True, save_code=False)
    out.mkdir(parents=True, exist_ok=True)
    run = wandb.init(name=out.name, dir=str(out), settings=settings)
    return Tracker(lambda step, figures: run.log(dict(figures), step=step), run.finish)


def _library(name: str, *, extra: str) -> Any:
    try:
        return import_module(name)
    except ImportError as exc:
        raise lacking(f"logging to {extra}", name, extra) from exc


TRACKERS: Table[Callable[[Path], Tracker]] = Table(
    "tracker", {"mlflow": _mlflow, "tensorboard": _tensorboard, "wandb": _wandb}
)
