"""The options that several commands share, declared once.

Options default to None: the defaults are the function's own, and ``shown`` repeats them for ``--help`` only
(a test compares the two).
"""

from pathlib import Path
from typing import Annotated, Any

import typer


def shown(text: str, default: str | None = None, **extra: Any) -> Any:
    """An option that ``--help`` explains as ``text`` with ``default``."""
    suffix = f" [default: {default}]" if default is not None else ""
    return typer.Option(help=text + suffix, show_default=False, **extra)


def codec_option(default: str) -> Any:
    """``--codec`` of a command whose own default is this."""
    return shown("how updates are packed: fp32, fp16 or int8", default, metavar="NAME")


ArtifactDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="artifact folder, made by `fleetune export`")
]

Config = Annotated[Path | None, shown("TOML file of these options; flags win over it", metavar="FILE")]
Json = Annotated[
    bool, typer.Option("--json", help="end with one JSON object on the last line of standard output")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="log what happens to standard error")]

Data = Annotated[Path | None, shown("labelled data: .jsonl, .jsonl.gz, .csv or .npz", metavar="FILE")]
Out = Annotated[Path | None, shown("folder to write", metavar="DIR")]
StartAdapter = Annotated[Path | None, shown("PEFT adapter folder to start from", metavar="DIR")]
Threads = Annotated[int | None, shown("threads; 0 for one per core", "0")]
Seed = Annotated[int | None, shown("seed of everything random", "0")]
Recompute = Annotated[
    bool | None,
    typer.Option(
        "--recompute/--save",
        help="recompute or save activations: less memory or less time",
        show_default=False,
    ),
]
Cores = Annotated[str | None, shown("cores to run on, as 0-3,6; all without it")]
Provider = Annotated[
    str | None, shown("onnxruntime's provider: cpu, cuda, tensorrt or xnnpack", "cpu", metavar="NAME")
]
Stream = Annotated[
    bool | None,
    typer.Option(
        "--stream/--resident",
        help="one layer's frozen weights in memory at a time, or all: less memory or less time",
        show_default=False,
    ),
]
MemoryBudget = Annotated[
    float | None, shown("fit the run into so much resident memory, in 10^6 bytes; 0 for no limit", "0.0")
]
HiddenCache = Annotated[
    float | None,
    shown("disk for what the frozen layers below the trained ones give, in 10^6 bytes; 0 for none", "0.0"),
]

Rules = Annotated[
    Path | None, shown("TOML table of when it may work, see docs/device-rules.md", metavar="FILE")
]

Mqtt = Annotated[
    str | None,
    shown("MQTT server: mqtt://, mqtts://, ws:// or wss://[user:password@]host[:port]", metavar="URL"),
]
Job = Annotated[
    str | None, shown("name of the federation; all devices and the aggregator say the same", metavar="NAME")
]
CaFile = Annotated[
    str | None, shown("PEM file of the authorities to trust for mqtts and wss", metavar="FILE")
]
Timeout = Annotated[float | None, shown("seconds to wait for the MQTT server at the start", "20.0")]

Policy = Annotated[
    str | None,
    shown("full, bernoulli, exact-k, suffix, successive or cyclic", "full", metavar="NAME"),
]
Drop = Annotated[
    float | None,
    shown("mean share of layers dropped (suffix, successive, cyclic: not trained), 0 to below 1", "0.0"),
]
DepthShape = Annotated[
    str | None,
    shown("which layers are dropped more: uniform, incremental, decay or normal", "uniform", metavar="NAME"),
]
Period = Annotated[int | None, shown("successive, cyclic: steps on one block of layers", "0")]
BatchSize = Annotated[int | None, shown("samples a step", "16")]
SeqLen = Annotated[int | None, shown("longest sequence, in tokens", "128")]
Lr = Annotated[float | None, shown("learning rate", "0.002")]
OptimizerName = Annotated[str | None, shown("optimizer: adamw or sgd", "adamw", metavar="NAME")]
WeightDecay = Annotated[float | None, shown("decoupled weight decay", "0.0")]
WarmupSteps = Annotated[int | None, shown("steps of linear warm-up", "0")]
Decay = Annotated[str | None, shown("after warm-up: constant, linear or cosine", "constant", metavar="NAME")]
ClipNorm = Annotated[float | None, shown("clip the global gradient norm to this; 0 for no clipping", "0.0")]
