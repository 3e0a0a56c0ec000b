"""Rows: what is known of each round, told from what a store keeps."""

from collections.abc import Callable, Sequence
from statistics import median_low

import msgspec

from fleetune.broker.store.store import ByKind, Figures, Store, in_all
from fleetune.device_runtime.contracts.scores import ACCURACY, named
from fleetune.device_runtime.prepared import prepared

WEIGHT_CAP = 3
"""A device's figures weigh at most this many times the middle one's: how many samples it has is its own word."""
_TOLD = 16
"""Of so many evaluating devices each one's figures are told."""


class Measurement(msgspec.Struct, frozen=True, kw_only=True):
    """What one evaluating device found of a version, as it told."""

    loss: float
    accuracy: float | None
    num_samples: int
    exact_match: float | None = None
    r2: float | None = None
    perplexity: float | None = None


Spending = Callable[[int], float | None]
"""Rounds that one device's data is in -> the epsilon of that."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a round; round 0 is the time before the first, with the adapter as exported.

    ``loss`` and the score are those of the version that the round made, over the evaluating devices by
    their samples, of which one counts for no more than 3 times the middle one; None until one has
    reported, and all but the score of the job's problem always. ``bytes_down`` and ``bytes_up`` are as in ``Cost``.
    """

    round: int
    devices: int
    loss: float | None = None
    accuracy: float | None = None
    exact_match: float | None = None
    """Of label sets."""
    r2: float | None = None
    """Of a regression."""
    perplexity: float | None = None
    """Of a language model, whose ``accuracy`` is the share of right next tokens."""
    score: str = ""
    """Which of these the model is judged by."""
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
    held: int = 0
    """Of the devices, those whose update counted for less than it said: it was beyond the bounds of the round."""
    evaluations: dict[str, Measurement] = {}
    """By device; empty if more than 16 have reported."""
    waited_s: float = 0.0
    """Of round 0: how long devices were waited for."""
    epsilon: float | None = None
    """Spent with this version and all before, of the device that was asked most often; None of a job without noise."""


def rows(
    store: Store, *, first: int = 0, spending: Spending | None = None, score: str = ACCURACY
) -> list[Row]:
    """One row for each version from ``first`` on of which something is known; of settled ones some have none."""
    found = (
        find_row(store, version, spending=spending, score=score) for version in range(first, store.newest + 1)
    )
    return [one for one in found if one is not None]


def find_row(
    store: Store, version: int, *, spending: Spending | None = None, score: str = ACCURACY
) -> Row | None:
    """As ``row``; None of a version that is settled and has no line."""
    if not 0 < version <= store.settled:
        return row(store, version, spending=spending, score=score)
    line = store.line(version)
    if line is None:
        return None
    told = called(msgspec.json.decode(line.text, type=prepared(Row)), score)
    return msgspec.structs.replace(told, epsilon=spending(line.turns)) if spending else told


def row(store: Store, version: int, *, spending: Spending | None = None, score: str = ACCURACY) -> Row:
    """What is known of the round that made a version that is not settled; ``spending`` is that of a job with noise."""
    figures = store.figures(version)
    cost, carried = store.cost(figures.round), in_all(store.carried(figures.round))
    found = Row(
        round=figures.round,
        devices=len(figures.trained),
        loss=_mean([(loss, n) for loss, _, n, _ in figures.evaluated]),
        accuracy=_mean([(accuracy, n) for _, accuracy, n, _ in figures.evaluated]),
        train_loss=_mean([(loss, n) for loss, n in figures.trained if loss is not None]),
        bytes_down=cost.bytes_down,
        bytes_up=cost.bytes_up,
        down=carried.down,
        up=carried.up,
        seconds=cost.seconds if version else 0.0,
        arms=dict(figures.arms),
        skipped=figures.skipped,
        held=figures.held,
        evaluations=_told(figures) if len(figures.evaluated) <= _TOLD else {},
        waited_s=0.0 if version else cost.seconds,
        epsilon=spending(max(store.turns(figures.round).values(), default=0)) if spending else None,
    )
    return called(found, score)


def called(told: Row, score: str) -> Row:
    """A row whose figures are called what they are; as the ledger keeps it the score is ``accuracy``."""
    devices = {device: named(found, score) for device, found in told.evaluations.items()}
    return msgspec.structs.replace(named(told, score), evaluations=devices, score=score or ACCURACY)


def _told(figures: Figures) -> dict[str, Measurement]:
    return {
        device: Measurement(loss=loss, accuracy=accuracy, num_samples=n)
        for loss, accuracy, n, device in sorted(figures.evaluated, key=lambda one: one[-1])
    }


def _mean(weighted: Sequence[tuple[float, int]]) -> float | None:
    if not weighted:
        return None
    most = WEIGHT_CAP * median_low([weight for _, weight in weighted])
    pairs = [(value, min(weight, most)) for value, weight in weighted]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if total else None
