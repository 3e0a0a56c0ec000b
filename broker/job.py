"""What a job is, fixed for its life, and how patient the aggregator is, which a restart may change."""

from collections.abc import Iterator

import msgspec

from fleetune.broker.strategies import STRATEGIES
from fleetune.device_runtime.contracts.codecs import make_codec
from fleetune.device_runtime.contracts.wire import FULL, LocalWork, check_name
from fleetune.device_runtime.errors import ConfigError


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job. The ledger keeps it and refuses to go on with another."""

    job: str
    artifact: str
    """SHA-256 of the artifact's manifest."""
    rounds: int
    clients: int
    """Devices asked in a round."""
    min_clients: int
    """Updates without which a round does not close."""
    strategy: str = "fedavg"
    down_codec: str = FULL
    """How versions are packed for a device that holds an earlier one: ``full`` for not at all, or a codec."""
    down_ratio: float = 0.0
    """Share of the elements that ``topk`` sends down; 0 for all other codecs."""
    work: LocalWork = LocalWork()
    seed: int = 0
    selection: str = "uniform"
    """Which of the devices here are asked."""
    configurator: str = "fixed"
    """How the work of each device is chosen."""
    evaluate_every: int = 1
    """Versions evaluated: 0, every so many, and the last."""


class Patience(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the aggregator waits for what, in seconds; 0 for ever."""

    deadline_s: float = 600.0
    """A round closes then, or is extended by as much again."""
    gather_s: float = 60.0
    """The first round waits so long for all ``clients`` devices; then ``min_clients`` do."""
    evaluation_s: float = 600.0
    """After the last round, longest wait for the next report of an evaluating device."""
    extensions_max: int = 10
    """A round extended more often than this stops the aggregator; the same command resumes it."""


def check_settings(settings: Settings, patience: Patience) -> None:
    """Raise ConfigError that lists everything wrong; UnknownName for the strategy or a codec."""
    check_name("job", settings.job)
    STRATEGIES[settings.strategy]
    _check_codecs(settings)
    problems = [*_problems(settings), *_patience_problems(patience)]
    if problems:
        raise ConfigError("; ".join(problems))


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


def _check_codecs(settings: Settings) -> None:
    make_codec(settings.work.codec, settings.work.codec_ratio)
    if settings.down_codec != FULL:
        make_codec(settings.down_codec, settings.down_ratio)
    elif settings.down_ratio:
        raise ConfigError(f"down_ratio {settings.down_ratio:g}: {FULL!r} has none")


def _problems(settings: Settings) -> Iterator[str]:
    if settings.rounds < 1:
        yield f"rounds {settings.rounds}: at least 1"
    if settings.clients < 1:
        yield f"clients {settings.clients}: at least 1"
    if not 1 <= settings.min_clients <= settings.clients:
        yield f"min_clients {settings.min_clients}: from 1 to clients ({settings.clients})"
    if settings.evaluate_every < 1:
        yield f"evaluate_every {settings.evaluate_every}: at least 1"
    if settings.seed < 0:
        yield f"seed {settings.seed}: not negative"
    yield from _work_problems(settings.work)


def _work_problems(work: LocalWork) -> Iterator[str]:
    for name in ("batch_size", "seq_len"):
        if getattr(work, name) < 1:
            yield f"{name} {getattr(work, name)}: at least 1"
    if work.steps < 0 or work.epochs < 0 or not (work.steps or work.epochs):
        yield f"local_steps {work.steps}, local_epochs {work.epochs}: one of them at least 1, none negative"
    if not work.optimizer.lr > 0:
        yield f"lr {work.optimizer.lr}: above 0"


def _patience_problems(patience: Patience) -> Iterator[str]:
    for name in patience.__struct_fields__:
        if not getattr(patience, name) >= 0:
            yield f"{name} {getattr(patience, name)}: not negative"
