"""The options of the commands: made from structs (``with_flags``), and those that are no struct's field, declared once.

Options default to None, so that what was given can be told from what was not: the defaults are the function's own, and
``shown`` repeats them for ``--help`` only (a test compares the two).
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from operator import getitem
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import msgspec
import typer

from fleetune.broker.jobs.members import Members
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import AUTO, Job
from fleetune.broker.jobs.work import OF_DEVICES
from fleetune.broker.laws import TABLES
from fleetune.device_runtime.agent.identity import Duty
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import HEAD_STARTS, LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.methods.sampling import Sampling
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.signing import Signing, Trust
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.training.evaluating import Evaluating
from fleetune.toolkit.demo import HOUSEHOLD_WORK
from fleetune.toolkit.flags import Flag, Part, claimed

F = TypeVar("F", bound=Callable[..., None])
_LAST = ("config", "json", "log_json", "verbose")
PANELS = {
    "columns": "Data",
    "sequences": "Data",
    "evaluating": "Data",
    "work": "Training",
    "sampling": "Text",
    "resources": "Machine",
    "duty": "Device",
    "job": "Federation",
    "patience": "Patience",
    "members": "Members",
    "reach": "Network",
    "signing": "Network",
    "trust": "Network",
    "terms": "Contract",
}
"""Headings of ``--help`` by the struct that the options below are fields of."""
_NEEDED = " [required]"
_ANNOTATED: Any = Annotated
"""Made of values, which a type checker would take for types."""

DEPTH = {"policy.shape": "depth_shape"}
ROUND = {"steps": "local_steps", "epochs": "local_epochs"}
"""Of a round; ``train`` calls them ``--steps`` and ``--epochs``."""
CHOSEN = {"policy.name": AUTO}
OWN_BY_DEVICE = (*OF_DEVICES, "learns")
"""What every device of every round gets of its own, or the kind of its round says."""
OF_A_FEDERATION = (
    *(
        "codec",
        "codec_ratio",
        "codec_bits",
        "rounds_before",
        "learns",
        "cache_below",
        "held_out",
        "rows",
        "rows_seed",
        "sums_bits",
        "most_norm",
        "noise",
        "mask",
        "personal",
        "personal_by",
        "histogram",
    ),
)
"""What means nothing to a machine that trains alone."""

TRAIN = {
    "columns": Part(Columns()),
    "sequences": Part(Sequences()),
    "evaluating": Part(Evaluating()),
    "work": Part(LocalWork(), names=DEPTH, without=(*OF_A_FEDERATION, "class_weights")),
    "resources": Part(Resources()),
}
GENERATE = {"sampling": Part(Sampling())}
PREDICT = {
    "columns": Part(Columns(), without=("label_column",)),
    "sequences": Part(Sequences(), without=("packing",)),
}
DEVICE = {
    "columns": Part(Columns()),
    "sequences": Part(Sequences()),
    "duty": Part(Duty()),
    "resources": Part(Resources()),
    "reach": Part(Reach()),
    "terms": Part(Terms()),
    "trust": Part(Trust()),
}
AGGREGATE = {
    "job": Part(Job),
    "work": Part(LocalWork(), names=DEPTH | ROUND, without=OWN_BY_DEVICE, more=CHOSEN),
    "patience": Part(Patience()),
    "reach": Part(Reach()),
    "signing": Part(Signing()),
    "members": Part(Members()),
}
WATCH = {"reach": Part(Reach())}
DEMO = {
    "columns": Part(Columns(), without=("pair_column",)),
    "work": Part(HOUSEHOLD_WORK, names=DEPTH | ROUND, without=OWN_BY_DEVICE, more=CHOSEN),
}


def with_flags(parts: Mapping[str, Part]) -> Callable[[F], F]:
    """Give a command the flags of ``parts``, before those that all commands have; it takes them as ``**flags``."""
    options = [_parameter(flag, PANELS.get(part)) for part, flag in claimed(parts).values()]

    def give(command: F) -> F:
        own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
        order = [*(p for p in own if p.name not in _LAST), *options, *(p for p in own if p.name in _LAST)]
        described: Any = command
        described.__signature__ = inspect.Signature(order, return_annotation=None)
        described.__annotations__ = {p.name: p.annotation for p in order} | {"return": None}
        return command

    return give


def needs(*names: str) -> Callable[[F], F]:
    """Say in ``--help`` that a command cannot do without these options, which flags or its file may give."""

    def mark(command: F) -> F:
        signature = inspect.signature(command, eval_str=True)
        marked = [_needed(p) if p.name in names else p for p in signature.parameters.values()]
        described: Any = command
        described.__signature__ = signature.replace(parameters=marked)
        described.__annotations__ = {p.name: p.annotation for p in marked} | {"return": None}
        return command

    return mark


def shown(text: str, default: str | None = None, *, names: Sequence[str] = (), **extra: Any) -> Any:
    """An option that ``--help`` explains as ``text`` with ``default``; ``names`` if it has more than its own."""
    suffix = f" [default: {default}]" if default is not None else ""
    return typer.Option(*names, help=text + suffix, show_default=False, **extra)


def _parameter(flag: Flag, panel: str | None) -> inspect.Parameter:
    hint: Any = flag.type | None
    option = _option(flag)
    option.rich_help_panel = panel
    annotation = getitem(_ANNOTATED, (hint, option))
    found = inspect.Parameter(flag.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)
    return _needed(found) if flag.default is msgspec.NODEFAULT else found


def _needed(parameter: inspect.Parameter) -> inspect.Parameter:
    hint, option = get_args(parameter.annotation)
    marked = copy(option)
    marked.help += _NEEDED
    return parameter.replace(annotation=getitem(_ANNOTATED, (hint, marked)))


def _option(flag: Flag) -> Any:
    option, dashed = flag.option, flag.name.replace("_", "-")
    names = [*filter(None, option.choices), *(TABLES[option.table] if option.table else ())]
    text = f"{option.help}: {listed(names)}" if names else option.help
    metavar = option.metavar or ("NAME" if names else None)
    if flag.type is bool:
        return typer.Option(f"--{dashed}/--{option.off or 'no-' + dashed}", help=text, show_default=False)
    default = None if flag.default in (msgspec.NODEFAULT, "") else str(flag.default)
    names = [f"--{dashed}", f"--{option.alias}"] if option.alias else []
    return shown(text, default, names=names, metavar=metavar)


def listed(names: Sequence[str]) -> str:
    """``a, b or c``."""
    return " or ".join((", ".join(names[:-1]), names[-1])) if names[1:] else names[0]


ArtifactDir = Annotated[
    Path, typer.Argument(metavar="DIR", help="artifact folder, made by `fleetune export`")
]

Config = Annotated[Path | None, shown("TOML file of these options; flags win over it", metavar="FILE")]
Json = Annotated[
    bool, typer.Option("--json", help="end with one JSON object on the last line of standard output")
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="log what happens to standard error")]

LogJson = Annotated[
    bool, typer.Option("--log-json", help="log to standard error, one JSON object a line, progress included")
]

Data = Annotated[Path | None, shown("labelled data: a file or folder, see docs/data.md", metavar="PATH")]
Out = Annotated[Path | None, shown("folder to write", metavar="DIR")]
StartAdapter = Annotated[Path | None, shown("PEFT adapter folder to start from", metavar="DIR")]
HeadStart = Annotated[
    str | None,
    shown(
        f"what the head begins with; class-mean: the class means of --data, from one forward pass: {listed(HEAD_STARTS)}",
        "none",
        metavar="NAME",
    ),
]
LogTo = Annotated[
    str | None,
    shown(
        "tell the figures of the run, as they come, to a tracker too: mlflow, tensorboard or wandb",
        metavar="NAME",
    ),
]
Threads = Annotated[int | None, shown("threads of the kernels; 0 for one a core", "0")]
Provider = Annotated[
    str | None, shown("onnxruntime's provider: cpu, cuda, tensorrt or xnnpack", "cpu", metavar="NAME")
]
Seed = Annotated[int | None, shown("seed of everything random", "0")]
Rules = Annotated[
    Path | None, shown("TOML table of when it may work, see docs/device-rules.md", metavar="FILE")
]
Mqtt = Annotated[
    str | None,
    shown(
        "MQTT server: mqtt://, mqtts://, ws:// or wss://host[:port]; its login is in the environment, "
        "FLEETUNE_MQTT_USERNAME and FLEETUNE_MQTT_PASSWORD, or user:password@ before the host",
        metavar="URL",
    ),
]
JobName = Annotated[
    str | None, shown("name of the federation; all devices and the aggregator say the same", metavar="NAME")
]
