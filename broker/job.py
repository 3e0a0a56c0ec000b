"""What a job is, fixed for its life, and how patient the aggregator is, which a restart may change."""

from collections.abc import Collection, Iterator
from typing import Annotated

import msgspec

from fleetune.broker.strategies import STRATEGIES
from fleetune.device_runtime.contracts.wire import LocalWork, check_name
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.methods import work as works
from fleetune.device_runtime.options import Option, problems, refuse

TABLES: dict[str, Collection[str]] = {**works.TABLES, STRATEGIES.kind: STRATEGIES}
"""Where the names in a job and its work are looked up."""


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job as the operator gives it: ``Job("home", rounds=20, clients=8)``."""

    job: Annotated[
        str, Option("name of the federation; all devices and the aggregator say the same", metavar="NAME")
    ]
    rounds: Annotated[int, Option("rounds in all", at_least=1)]
    clients: Annotated[int, Option("training devices in a round; of more, so many are drawn", at_least=1)]
    min_clients: Annotated[
        int, Option("updates a round needs at its deadline; 0 for all of --clients", at_least=0)
    ] = 0
    strategy: Annotated[str, Option("how updates are combined", table="strategy")] = "fedavg"
    seed: Annotated[int, Option("seed of everything random", at_least=0)] = 0
    evaluate_every: Annotated[
        int, Option("versions evaluated: 0, every so many, and the last", at_least=1)
    ] = 1


class Settings(Job, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job of an artifact with its work. The ledger keeps it and refuses to go on with another."""

    artifact: str
    """SHA-256 of the artifact's manifest."""
    work: LocalWork = LocalWork()


class Patience(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the aggregator waits for what."""

    deadline_s: Annotated[
        float,
        Option("seconds after which a round closes, or is extended by as much; 0 for never", at_least=0),
    ] = 600.0
    gather_s: Annotated[
        float, Option("seconds the first round waits for all clients, then for min_clients", at_least=0)
    ] = 60.0
    evaluation_s: Annotated[
        float,
        Option("seconds to wait for the next report after the last round; 0 for ever", at_least=0),
    ] = 600.0
    extensions_max: Annotated[
        int, Option("extensions of one round before the aggregator stops", at_least=0)
    ] = 10


def settings_of(job: Job, *, artifact: str, work: LocalWork) -> Settings:
    """Join a job, the digest of its artifact and its work; ``min_clients`` 0 becomes all of ``clients``.

    Raises:
        ConfigError: ``work`` has what each device of each round gets of its own.
    """
    given = [name for name in ("seed", "rounds_before") if getattr(work, name)]
    if given:
        raise ConfigError(
            f"work: {' and '.join(given)} cannot be given; devices get their own, by the job's seed"
        )
    fields = msgspec.structs.asdict(job) | {"min_clients": job.min_clients or job.clients}
    return Settings(**fields, artifact=artifact, work=work)


def check_settings(settings: Settings, patience: Patience, *, num_layers: int) -> None:
    """Raise ConfigError that lists everything wrong; UnknownName for one unknown name.

    Args:
        settings: the job's.
        patience: the aggregator's.
        num_layers: of the model; devices would refuse work that does not suit it.
    """
    check_name("job", settings.job)
    refuse([*_problems(settings, num_layers), *problems(patience)])


def differences(mine: Settings, theirs: Settings) -> list[str]:
    """Fields in which two settings differ, as 'clients: 4, was 3'."""
    left, right = (msgspec.to_builtins(s) for s in (mine, theirs))
    return [f"{name}: {left[name]!r}, was {right[name]!r}" for name in left if left[name] != right[name]]


def device_work(settings: Settings, *, round_number: int, position: int) -> LocalWork:
    """Work of the device asked as number ``position`` (from 0) in a round (from 1), with a seed of its own.

    It says how many rounds came before, also to a device that was not asked in them: in a round all train the same layers.

    The first device of the first round has the job's own seed: with it one local run is one federated round.
    """
    seed = settings.seed + (round_number - 1) * 2**20 + position
    return msgspec.structs.replace(settings.work, seed=seed, rounds_before=round_number - 1)


def _problems(settings: Settings, num_layers: int) -> Iterator[str]:
    found = problems(settings, TABLES)
    yield from found
    if not 1 <= settings.min_clients <= settings.clients:
        yield f"min_clients {settings.min_clients}: from 1 to clients ({settings.clients})"
    yield from (said for said in works.work_problems(settings.work, num_layers) if said not in found)
