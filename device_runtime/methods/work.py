"""Whether local work can be done: one law for the aggregator that offers it and the device that does it."""

from collections.abc import Iterator
from typing import Any

from fleetune.device_runtime.contracts.accounting import sampling_problems
from fleetune.device_runtime.contracts.codecs import CODECS, make_codec
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.methods.optim import DECAYS, OPTIMIZERS, make_optimizer
from fleetune.device_runtime.methods.personal import RANKINGS
from fleetune.device_runtime.methods.policies import POLICIES, make_policy
from fleetune.device_runtime.methods.schedules import SCHEDULES
from fleetune.device_runtime.methods.shapes import SHAPES
from fleetune.device_runtime.options import problems, refuse
from fleetune.device_runtime.tables import Table

TABLES: dict[str, Table[Any]] = {
    table.kind: table for table in (CODECS, DECAYS, OPTIMIZERS, POLICIES, RANKINGS, SCHEDULES, SHAPES)
}
"""Where the names in a :class:`LocalWork` are looked up."""


def work_problems(work: LocalWork, num_layers: int, *, learning: int | None = None) -> list[str]:
    """Return all that keeps a model from being trained so.

    Args:
        work: what is asked.
        num_layers: blocks of the model.
        learning: how many of them have an adapter; None for all.
    """
    if work.policy.name == "auto":
        return [
            f"no policy 'auto' here: an aggregator chooses so for its devices (fleetune aggregate); have: {choices(POLICIES)}"
        ]
    found = problems(work, TABLES)
    if not (work.steps or work.epochs):
        found.append("nothing to do: steps and epochs are both 0")
    if work.personal_by in RANKINGS and work.personal_by != "importance" and not work.personal:
        found.append(f"personal_by {work.personal_by!r}: no layer stays personal")
    if work.personal > 0 and work.personal >= (have := num_layers if learning is None else learning):
        found.append(f"personal {work.personal}: one layer at least is shared, and {have} have an adapter")
    if work.cache_below > num_layers:
        found.append(f"cache_below {work.cache_below}: the model has {num_layers} layers")
    found += [] if found else sampling_problems(work)
    return found or [*_refusals(work, num_layers)]


def check_work(work: LocalWork, num_layers: int, *, learning: int | None = None) -> None:
    """Raise ConfigError that lists all of :func:`work_problems`, UnknownName for one unknown name."""
    refuse(work_problems(work, num_layers, learning=learning))


def _refusals(work: LocalWork, num_layers: int) -> Iterator[str]:
    """What policy, optimizer and codec have against values that keep to their own laws each."""
    for make in (
        lambda: make_policy(work.policy, num_layers),
        lambda: make_optimizer(work.optimizer, total_steps=1),
        lambda: make_codec(work.codec, work.codec_ratio, work.codec_bits),
    ):
        try:
            make()
        except ConfigError as exc:
            yield str(exc)
    yield from _memory_problems(work)


def _memory_problems(work: LocalWork) -> Iterator[str]:
    """What a codec that remembers a device's updates has against parts that are others from round to round."""
    parts = [name for name in ("rows", "mask") if getattr(work, name)]
    try:
        is_remembered = bool(make_codec(work.codec, work.codec_ratio, work.codec_bits).receiver)
    except ConfigError:
        return
    if parts and is_remembered:
        yield f"codec {work.codec!r}: it remembers whole tensors; leave {' and '.join(parts)} out"
