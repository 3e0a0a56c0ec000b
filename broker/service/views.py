"""A job at one moment, for a page or a terminal: plain data, made from the parts that know."""

from collections.abc import Iterator

import msgspec

from fleetune.broker.methods.accounting import spending_of
from fleetune.broker.rounds.federation import Federation
from fleetune.broker.store.rows import Row, rows
from fleetune.broker.store.store import Cost, Store


class DeviceView(msgspec.Struct, frozen=True, kw_only=True):
    """A device that is here, or belongs to the open round."""

    device_id: str
    role: str
    is_here: bool
    standing: str
    """``pending``, ``accepted`` or ``refused`` in the open round, ``evaluating``, or ``idle``."""
    task_id: str = ""
    """What it was asked to do last, if that is still of this round or of its evaluation."""
    paused: str = ""
    """Why its own rules keep it from working; empty if they do not."""
    left_out_until: int = 0
    """The last round that it is not asked in, for what its updates were; 0 if it may be asked."""


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """A job at one moment."""

    job: str
    artifact: str
    round: int
    """Number of the open round, or of the last one closed."""
    rounds: int
    """In all."""
    version: int
    is_open: bool
    """Whether a round is open."""
    finished: bool
    devices: list[DeviceView]
    """By name."""
    cost: Cost
    """Booked so far; what the open round has moved since the last booking is not in it."""
    rows: list[Row]


def view_of(federation: Federation, store: Store) -> JobView:
    """A job as it stands."""
    settings, scheduler = federation.settings, federation.rounds
    devices = [*_training(federation), *_evaluating(federation)]
    return JobView(
        job=settings.job,
        artifact=settings.artifact,
        round=federation.round,
        rounds=settings.rounds,
        version=federation.version,
        is_open=scheduler.open_round is not None,
        finished=store.finished,
        devices=sorted(devices, key=lambda device: device.device_id),
        cost=store.cost(),
        rows=rows(store, spending=spending_of(settings.dp, settings.work), score=settings.score),
    )


def _training(federation: Federation) -> Iterator[DeviceView]:
    roster, open_round = federation.rounds.roster, federation.rounds.open_round
    left_out = federation.rounds.quarantine.until(federation.round)
    for device in {*roster.present, *(open_round.tasks if open_round else ())}:
        task = federation.rounds.task(device)
        standing = open_round.standing(device) if open_round else None
        yield DeviceView(
            device_id=device,
            role="train",
            is_here=device in roster,
            standing=standing.value if standing else "idle",
            task_id=task.task_id if task else "",
            paused=roster.paused.get(device, ""),
            left_out_until=left_out.get(device, 0),
        )


def _evaluating(federation: Federation) -> Iterator[DeviceView]:
    for device in federation.evaluations.present:
        task = federation.evaluations.task(device)
        yield DeviceView(
            device_id=device,
            role="evaluate",
            is_here=True,
            standing="evaluating" if task else "idle",
            task_id=task.task_id if task else "",
            paused=federation.rounds.roster.paused.get(device, ""),
        )
