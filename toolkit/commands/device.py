"""Commands of one device without a network: train, predict."""

from pathlib import Path
from typing import Annotated, Any

from rich.console import Console

from fleetune.toolkit import live
from fleetune.toolkit.commands.options import (
    ArtifactDir,
    BatchSize,
    ClipNorm,
    Config,
    Cores,
    Data,
    Decay,
    DepthShape,
    Drop,
    HiddenCache,
    Json,
    Lr,
    MemoryBudget,
    OptimizerName,
    Out,
    Period,
    Policy,
    Provider,
    Recompute,
    Rules,
    Seed,
    SeqLen,
    StartAdapter,
    Stream,
    Threads,
    Verbose,
    WarmupSteps,
    WeightDecay,
    shown,
)
from fleetune.toolkit.commands.running import Watch, call


def train(
    artifact_dir: ArtifactDir,
    *,
    data: Data = None,
    out: Out = None,
    eval: Annotated[Path | None, shown("labelled data to measure the result on", metavar="FILE")] = None,
    policy: Policy = None,
    drop: Drop = None,
    depth_shape: DepthShape = None,
    period: Period = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    steps: Annotated[int | None, shown("steps; 0 to count epochs instead", "0")] = None,
    epochs: Annotated[int | None, shown("passes over the data", "1")] = None,
    lr: Lr = None,
    optimizer: OptimizerName = None,
    weight_decay: WeightDecay = None,
    warmup_steps: WarmupSteps = None,
    decay: Decay = None,
    clip_norm: ClipNorm = None,
    seed: Seed = None,
    threads: Threads = None,
    cores: Cores = None,
    provider: Provider = None,
    recompute: Recompute = None,
    stream: Stream = None,
    memory_budget_mb: MemoryBudget = None,
    hidden_cache_mb: HiddenCache = None,
    checkpoint_every: Annotated[int | None, shown("steps between checkpoints", "50")] = None,
    adapter: StartAdapter = None,
    rules: Rules = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train on this machine, without a network.

    The same command again resumes a run that was killed.
    """
    call(
        "fleetune.device_runtime.commands.train:train",
        locals(),
        argument="artifact_dir",
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
