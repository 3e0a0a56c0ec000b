"""``fleetune simulate CONFIG.toml``: the file as structs, what it includes, and what the command line sets over it.

Docs: ``docs/simulation.md``.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from os.path import realpath
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Job
from fleetune.broker.jobs.work import OF_DEVICES
from fleetune.broker.laws import TABLES
from fleetune.device_runtime.contracts.fields import COUNT_MAX, check_name
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.draws import SEED_MAX
from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.options import Option, refuse
from fleetune.device_runtime.prepared import prepared
from fleetune.device_runtime.toml_tables import mistakes, read_table
from fleetune.toolkit.simulation.availability import Availability
from fleetune.toolkit.simulation.networks import MODELS, Network, NetworkModel
from fleetune.toolkit.simulation.partitions import KINDS, Partition, partition_problems
from fleetune.toolkit.simulation.profiles import PROFILES, Profile, profile_problems

INCLUDE = "include"
WORKERS_MAX = 1024
"""Processes of one machine; each takes a core and the memory of an interpreter, so more are a slip."""
OF_JOB = {"job": "name", "rounds": "rounds", "clients": "clients", "seed": "seed"}
"""Fields of a job that stand at the top of the file, and as what."""
PATHS = (
    ("artifact",),
    ("timings",),
    ("data", "train"),
    ("data", "test"),
    ("partition", "file"),
    ("partition", "code"),
    ("fleet", "code"),
    ("network", "trace"),
)
"""Values that are paths, taken from the folder of the file that says them."""


class DataFiles(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the fleet learns from, and is measured on: files as ``fleetune device --data`` takes them."""

    train: Annotated[str, Option("labelled data that is shared out among the devices")]
    test: Annotated[str, Option("labelled data that no device has")]
    limit_train: Annotated[
        int, Option("so many examples, drawn by the seed; 0 for all of them", at_least=0)
    ] = 0
    limit_test: Annotated[
        int, Option("so many examples, drawn by the seed; 0 for all of them", at_least=0)
    ] = 0
    text_column: Annotated[str, Option("column of the texts; empty: text, or tokens")] = ""
    pair_column: Annotated[str, Option("column of the second text of a pair; empty: text_b, if any")] = ""
    label_column: Annotated[str, Option("column of the labels; empty: label, or labels")] = ""

    @property
    def columns(self) -> Columns:
        """Where the rows of both files have what they hold."""
        return Columns(
            text_column=self.text_column, pair_column=self.pair_column, label_column=self.label_column
        )


class Fleet(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which devices there are: of each profile a share of the fleet, or a number."""

    profiles: Annotated[
        dict[str, float],
        Option("part of the fleet by profile: shares or numbers, scaled to the number of devices"),
    ] = msgspec.field(default_factory=lambda: {"reference": 1.0})
    code: Annotated[
        str,
        Option(
            "'FILE.py:FUNCTION', the user's own: (number of a device, its workbench) -> what it works with instead, for devices "
            "that do not do as they are told"
        ),
    ] = ""


class Cache(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Whether devices keep what their frozen lower layers give."""

    hidden_cache: Annotated[bool, Option("keep it, from round to round where the layers stay frozen")] = True


class SimulationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A simulation: one arm with one seed."""

    name: Annotated[str, Option("of the arm; runs that differ in their seed alone share it")]
    artifact: Annotated[str, Option("folder made by fleetune export")]
    rounds: Annotated[int, Option("rounds in all", at_least=1, at_most=COUNT_MAX)]
    clients: Annotated[int, Option("training devices in a round", at_least=1)]
    data: DataFiles
    partition: Partition
    until_s: Annotated[
        float,
        Option("virtual seconds after which no further round begins; 0 for none but by rounds", at_least=0),
    ] = 0.0
    seed: Annotated[int, Option("seed of everything random", at_least=0, below=SEED_MAX + 1)] = 0
    timings: Annotated[
        str, Option("file of measured step times; measured and written there if it is not there")
    ] = ""
    workers: Annotated[int, Option("worker processes; 0 for one a core", at_least=0, at_most=WORKERS_MAX)] = 0
    fleet: Fleet = Fleet()
    profiles: dict[str, Profile] = {}
    """The user's own, beside or over :data:`PROFILES`."""
    network: Network = Network()
    networks: dict[str, NetworkModel] = {}
    """The user's own, beside or over :data:`MODELS`."""
    availability: Availability = Availability()
    work: LocalWork = LocalWork()
    job: Job
    """``[job]`` with name, rounds, clients and seed from the top."""
    patience: Patience = Patience()
    cache: Cache = Cache()

    @property
    def column_file(self) -> Path:
        """Where the column of a partition by column is read from, row by row as the training data."""
        return Path(self.partition.file or self.data.train)

    @property
    def all_profiles(self) -> dict[str, Profile]:
        """Ours, and the file's own over them."""
        return {**PROFILES, **self.profiles}

    @property
    def all_networks(self) -> dict[str, NetworkModel]:
        """Ours, and the file's own over them."""
        return {**MODELS, **self.networks}


def load_config(path: Path | str, overrides: Sequence[str] = ()) -> SimulationConfig:
    """Read a file with all that it includes, and set ``overrides`` over it.

    Args:
        path: TOML.
        overrides: ``key=value`` each, as ``seed=2`` or ``work.policy.name=suffix``; a value is TOML, or else a text.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value out of its range (all listed); UnknownName for one unknown name.
    """
    table = read_included(Path(path))
    for override in overrides:
        table = merged(table, _nested(override))
    return config_of(table, str(path))


def config_of(table: Mapping[str, Any], where: str = "configuration") -> SimulationConfig:
    """Make the structs of a table that was read; errors as :func:`load_config`."""
    table = {**table, "job": table.get("job", {})}
    tables = {**TABLES, KINDS.kind: KINDS}
    without = {"job": OF_JOB, "work": OF_DEVICES}
    _refuse(where, mistakes(SimulationConfig, table, "", tables=tables, without=without))
    config = msgspec.convert(_with_job(table), prepared(SimulationConfig))
    _refuse(where, _contradictions(config))
    return config


def read_included(path: Path, *, below: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Read a file over those that it includes; its paths, and theirs, are taken from the folder of each.

    Raises:
        ConfigError: a file that cannot be read, or that includes itself.
    """
    here = Path(realpath(path))  # Path.resolve fails at a loop of links, in words of its own
    if here in below:
        raise ConfigError(f"{path}: includes itself, by way of {below[-1].name}")
    own = _from_folder(read_table(path), path.parent)
    included = own.pop(INCLUDE, [])
    names = [included] if isinstance(included, str) else included
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{path}: include = {included!r}: expected a file name, or a list of them")
    table: dict[str, Any] = {}
    for name in names:
        table = merged(table, read_included(path.parent / name, below=(*below, here)))
    return merged(table, own)


def merged(under: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Lay a table over another: tables in both key by key, everything else whole."""
    both = {
        key: merged(under[key], over[key])
        for key in under.keys() & over.keys()
        if isinstance(under[key], Mapping) and isinstance(over[key], Mapping)
    }
    return {**under, **over, **both}


def _nested(override: str) -> dict[str, Any]:
    key, is_there, text = override.partition("=")
    names = [name.strip() for name in key.split(".")]
    if not is_there or not all(names):
        raise ConfigError(f"--set {override}: expected key=value, as seed=2 or work.policy.name=suffix")
    value: Any = _value(text.strip())
    for name in reversed(names):
        value = {name: value}
    nested: dict[str, Any] = value
    return nested


def _value(text: str) -> Any:
    try:
        return msgspec.toml.decode(f"value = {text}")["value"]
    except msgspec.DecodeError:
        return text


def _from_folder(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    for *above, name in PATHS:
        holder: Any = table
        for key in above:
            holder = holder.get(key) if isinstance(holder, dict) else None
        if isinstance(holder, dict) and isinstance(holder.get(name), str) and holder[name]:
            holder[name] = str(folder / holder[name])
    return table


def _refuse(where: str, found: Iterable[str]) -> None:
    listed = list(found)
    refuse([f"{where}: {listed[0]}", *listed[1:]] if listed else [])


def _with_job(table: Mapping[str, Any]) -> dict[str, Any]:
    top = {field: table[name] for field, name in OF_JOB.items() if name in table}
    return {**table, "job": {**table.get("job", {}), **top}}


def _contradictions(config: SimulationConfig) -> Iterator[str]:
    try:
        check_name("name", config.name)
    except ConfigError as exc:
        yield str(exc)
    yield from (f"partition: {said}" for said in partition_problems(config.partition))
    if config.availability.dropout == ():
        yield "availability.dropout: an empty list; expected a chance, or one for each of the first rounds"
    yield from _unknown("fleet.profiles", config.fleet.profiles, "profile", config.all_profiles)
    wanted = [config.network.model, *(profile.network for profile in config.profiles.values())]
    yield from _unknown("network", filter(None, wanted), "network", config.all_networks)
    for name, profile in config.profiles.items():
        yield from profile_problems(name, profile)
    shares = config.fleet.profiles.values()
    if any(not 0 <= share < 1e9 for share in shares) or not sum(shares):
        yield f"fleet.profiles: shares {list(shares)}: expected numbers from 0, not all 0"


def _unknown(where: str, names: Any, kind: str, known: Collection[str]) -> Iterator[str]:
    yield from (f"{where}: no {kind} {name!r}; have: {choices(known)}" for name in names if name not in known)
