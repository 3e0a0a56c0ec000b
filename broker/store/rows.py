"""Rows: what is known of each round, told from what a store keeps."""

from collections.abc import Callable, Iterable

import msgspec

from fleetune.broker.store.store import ByKind, Store, in_all

Spending = Callable[[int], float | None]
"""Rounds that one device's data is in -> the epsilon of that."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a round; round 0 is the time before the first, with the adapter as exported.

    ``loss`` and ``accuracy`` are those of the version that the round made, over the evaluating devices by
    their samples; None until one has reported. ``bytes_down`` and ``bytes_up`` are as in ``Cost``.
    """

    round: int
    devices: int
    loss: float | None = None
    accuracy: float | None = None
    train_loss: float | None = None
    """Mean of the devices' last local losses, by their samples."""
    bytes_down: int = 0
    bytes_up: int = 0
    down: ByKind = ByKind()
    """All that was sent to devices, their protocol included."""
    up: ByKind = ByKind()
    seconds: float = 0.0
    """From the round before to the end of this one; 0 of round 0, which does nothing but wait."""
    arms: dict[str, int] = {}
    """How many devices trained under which policy."""
    skipped: int = 0
    """Of the devices, those that sent no update, and whose last one counted again."""
    waited_s: float = 0.0
    """Of round 0: how long devices were waited for."""
    epsilon: float | None = None
    """Spent with this version and all before, of the device that was asked most often; None of a job without noise."""


def rows(store: Store, *, spending: Spending | None = None) -> list[Row]:
    """One row for each version, 0 first."""
    return [row(store, version, spending=spending) for version in range(store.newest + 1)]


def row(store: Store, version: int, *, spending: Spending | None = None) -> Row:
    """What is known of the round that made a version; ``spending`` is that of a job with noise."""
    figures = store.figures(version)
    cost, carried = store.cost(figures.round), in_all(store.carried(figures.round))
    return Row(
        round=figures.round,
        devices=len(figures.trained),
        loss=_mean((loss, n) for loss, _, n in figures.evaluated),
        accuracy=_mean((accuracy, n) for _, accuracy, n in figures.evaluated),
        train_loss=_mean((loss, n) for loss, n in figures.trained if loss is not None),
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        down=carried.down,
        up=carried.up,
        seconds=cost.seconds if version else 0.0,
        arms=dict(figures.arms),
        skipped=figures.skipped,
        waited_s=0.0 if version else cost.seconds,
        epsilon=spending(max(store.turns(figures.round).values(), default=0)) if spending else None,
    )


def _mean(weighted: Iterable[tuple[float, int]]) -> float | None:
    pairs = list(weighted)
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
