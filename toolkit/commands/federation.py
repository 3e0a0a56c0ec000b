"""Commands of a federation: device, aggregate, broker, demo, bench."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.toolkit import live
from fleetune.toolkit.commands.options import (
    ArtifactDir,
    BatchSize,
    CaFile,
    ClipNorm,
    Config,
    Cores,
    Data,
    Decay,
    DepthShape,
    Drop,
    HiddenCache,
    Job,
    Json,
    Lr,
    MemoryBudget,
    Mqtt,
    OptimizerName,
    Out,
    Period,
    Policy,
    Provider,
    Recompute,
    Rules,
    Seed,
    SeqLen,
    Stream,
    Threads,
    Timeout,
    Verbose,
    WarmupSteps,
    WeightDecay,
    codec_option,
    shown,
)
from fleetune.toolkit.commands.running import Watch, call


def device(
    artifact_dir: ArtifactDir,
    *,
    data: Data = None,
    mqtt: Mqtt = None,
    job: Job = None,
    id: Annotated[str | None, shown("name of this device", "made once and kept in the state folder")] = None,
    state: Annotated[Path | None, shown("folder that survives restarts", metavar="DIR")] = None,
    role: Annotated[str | None, shown("train or evaluate", "train", metavar="NAME")] = None,
    threads: Threads = None,
    cores: Cores = None,
    provider: Provider = None,
    recompute: Recompute = None,
    stream: Stream = None,
    memory_budget_mb: MemoryBudget = None,
    hidden_cache_mb: HiddenCache = None,
    ca_file: CaFile = None,
    checkpoint_every: Annotated[int | None, shown("steps between checkpoints", "20")] = None,
    timeout_s: Timeout = None,
    idle_limit_s: Annotated[
        float | None, shown("seconds to wait for the aggregator; 0 for ever", "0.0")
    ] = None,
    rules: Rules = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Train for an aggregator until the job is over.

    The same command again resumes after a kill: the state folder holds everything that must not be lost.
    """
    call(
        "fleetune.device_runtime.commands.device:device",
        locals(),
        argument="artifact_dir",
        watch=Watch("on_event", live.messages),
    )


def aggregate(
    artifact_dir: ArtifactDir,
    *,
    mqtt: Mqtt = None,
    job: Job = None,
    rounds: Annotated[int | None, shown("rounds in all")] = None,
    clients: Annotated[int | None, shown("training devices in a round")] = None,
    out: Out = None,
    strategy: Annotated[str | None, shown("how updates are combined", "fedavg", metavar="NAME")] = None,
    codec: Annotated[str | None, codec_option("fp32")] = None,
    policy: Policy = None,
    drop: Drop = None,
    depth_shape: DepthShape = None,
    period: Period = None,
    batch_size: BatchSize = None,
    seq_len: SeqLen = None,
    local_steps: Annotated[
        int | None, shown("steps a device makes in a round; 0 to count epochs", "0")
    ] = None,
    local_epochs: Annotated[int | None, shown("passes a device makes over its data in a round", "1")] = None,
    lr: Lr = None,
    optimizer: OptimizerName = None,
    weight_decay: WeightDecay = None,
    warmup_steps: WarmupSteps = None,
    decay: Decay = None,
    clip_norm: ClipNorm = None,
    min_clients: Annotated[
        int | None, shown("updates a round needs at its deadline", "all of --clients")
    ] = None,
    deadline_s: Annotated[float | None, shown("seconds a round may last; 0 for ever", "600.0")] = None,
    gather_s: Annotated[float | None, shown("seconds the first round waits for all clients", "60.0")] = None,
    evaluate_every: Annotated[int | None, shown("rounds between evaluations", "1")] = None,
    evaluation_s: Annotated[float | None, shown("seconds to wait for the last evaluation", "600.0")] = None,
    extensions_max: Annotated[int | None, shown("extensions of one round before giving up", "10")] = None,
    seed: Seed = None,
    ca_file: CaFile = None,
    timeout_s: Timeout = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Combine what the devices learn.

    The same command again resumes a run that was killed.
    """
    call(
        "fleetune.broker.aggregation:aggregate",
        locals(),
        argument="artifact_dir",
        watch=Watch("on_round", live.rounds),
    )


def broker(
    *,
    port: Annotated[int | None, shown("TCP port", "1883")] = None,
    host: Annotated[str | None, shown("address to listen on", "127.0.0.1")] = None,
    verbose: Verbose = False,
) -> None:
    """Run an MQTT server, for trials."""
    call("fleetune.broker.servers.embedded:serve", locals(), watch=Watch("on_progress", live.messages))


def demo(
    *,
    data: Annotated[
        Path | None, shown("your own labelled data", "made-up household utterances", metavar="FILE")
    ] = None,
    rounds: Annotated[int | None, shown("rounds in all", "6")] = None,
    devices: Annotated[int | None, shown("training devices", "4")] = None,
    out: Annotated[Path | None, shown("folder to write", "demo-run", metavar="DIR")] = None,
    seed: Seed = None,
    policy: Policy = None,
    drop: Drop = None,
    period: Period = None,
    codec: Annotated[str | None, codec_option("fp16")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Do all of it on this machine.

    Export, MQTT server, aggregator, device processes, evaluation: a few minutes, no arguments needed.
    """
    call("fleetune.toolkit.demo:demo", locals(), watch=Watch("on_event", live.demo_events), show=_show_demo)


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help="which figure, see benchmarks/")],
    *,
    only: Annotated[str | None, shown("what of it to measure, as a,b", "everything")] = None,
    repeats: Annotated[int | None, shown("interleaved repeats", "the benchmark's own")] = None,
    threads: Annotated[
        int | None, shown("threads of each process measured", "the benchmark's own, mostly 2")
    ] = None,
    chart: Annotated[Path | None, shown("draw the figures into this SVG file", metavar="FILE")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a figure of benchmarks/."""
    flags = locals() | {"only": only.split(",") if only else None}
    call(
        "fleetune.toolkit.benchmark:bench", flags, argument="name", watch=Watch("on_progress", live.messages)
    )


def _show_demo(console: Console, report: Any) -> None:
    for line in (
        f"accuracy {report.accuracy_before:.3f} -> {report.accuracy:.3f} on lines that no device has",
        f"{report.mean_active_layers:.1f} layers active in a step; a device took at most {report.device_peak_rss_mb:.0f} MB",
        f"{live.size(report.bytes_down)} down and {live.size(report.bytes_up)} up in {report.rounds} rounds",
        f"{report.wall_s:.0f} s in all",
        f"adapter: {report.adapter} (fleetune merge, or peft.PeftModel.from_pretrained)",
    ):
        console.print(line, markup=False)
