"""Commands of one device without a network: train, predict."""

from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fleetune.toolkit import live
from fleetune.toolkit.commands.options import (
    TRAIN,
    ArtifactDir,
    Config,
    Data,
    Json,
    Out,
    Rules,
    StartAdapter,
    Threads,
    Verbose,
    shown,
    with_flags,
)
from fleetune.toolkit.commands.running import Watch, call


@with_flags(TRAIN)
def train(
    artifact_dir: ArtifactDir,
    *,
    data: Data = None,
    out: Out = None,
    eval: Annotated[Path | None, shown("labelled data to measure the result on", metavar="FILE")] = None,
    checkpoint_every: Annotated[int | None, shown("steps between checkpoints; 0 for none", "50")] = None,
    adapter: StartAdapter = None,
    rules: Rules = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Train on this machine, without a network.

    The same command again resumes a run that was killed.
    """
    call(
        "fleetune.device_runtime.commands.train:train",
        locals(),
        argument="artifact_dir",
        parts=TRAIN,
        watch=Watch("on_step", live.steps, notes="on_note"),
    )


def predict(
    artifact_dir: ArtifactDir,
    *,
    text: Annotated[str | None, shown("one text", metavar="TEXT")] = None,
    data: Data = None,
    run: Annotated[Path | None, shown("run folder whose adapter to use", metavar="DIR")] = None,
    adapter: Annotated[Path | None, shown("PEFT adapter folder to use", metavar="DIR")] = None,
    batch_size: Annotated[int | None, shown("samples at a time", "32")] = None,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Use the personalised model."""
    call(
        "fleetune.device_runtime.commands.predict:predict",
        locals(),
        argument="artifact_dir",
        show=_show_predictions,
    )


def _show_predictions(console: Console, predictions: list[Any]) -> None:
    for prediction in predictions:
        console.print(
            f"{prediction.score:.3f}  {prediction.label}  {prediction.text or ''}".rstrip(), markup=False
        )
