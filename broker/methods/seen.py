"""What has been seen of the devices of a job: what every traffic planner goes by, a function of the outcomes alone.

It takes some 200 bytes for each device that ever took part, and 8 for each class of a label histogram.
"""

from collections.abc import Mapping
from typing import NamedTuple

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.depths import is_time
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.fields import FIGURE_MAX
from fleetune.device_runtime.contracts.work import ADAPTER, LocalWork

RATE_MIN, RATE_MAX = 1.0, 1e12
"""Bytes a second of a link; what is outside is not believed."""
WEIGHTY_BYTES = 64 * 1024
"""Of a transfer that is smaller the latency may have the larger part: it only raises what is believed of a link."""


class Seen(NamedTuple):
    """What is known of one device; 0 where it is not."""

    round: int
    """That it took part in last."""
    num_samples: int = 0
    sample_s: float = 0.0
    """Seconds of training for a sample, of its newest work."""
    down: float = 0.0
    """Bytes a second."""
    up: float = 0.0
    histogram: tuple[int, ...] | None = None
    """Samples of each class; empty: it was asked, and tells nothing; None: it was not asked yet."""
    loss: float = 0.0
    """Of its last steps."""


class Fleet(NamedTuple):
    """State of a traffic planner."""

    settings: Settings
    devices: dict[str, Seen]


def blank(settings: Settings) -> Fleet:
    """Begin with nobody."""
    return Fleet(settings, {})


def note(fleet: Fleet, outcome: Outcome) -> Fleet:
    """Note an accepted update; a declined task tells nothing of a link. The fleet given is used up."""
    if outcome.declined is not None:
        return fleet
    before, noted = fleet.devices.get(outcome.device_id, Seen(0)), outcome.noted
    fleet.devices[outcome.device_id] = Seen(
        max(before.round, outcome.round),
        outcome.num_samples or before.num_samples,
        _sample_s(fleet.settings, outcome, before.sample_s),
        _rate(noted.bytes_down, noted.seconds_down, before.down),
        _rate(noted.bytes_up, noted.seconds_up, before.up),
        noted.histogram if outcome.work.histogram else before.histogram,
        _loss(outcome.stats.get("loss", before.loss), before.loss),
    )
    return fleet


def samples_of(work: LocalWork, num_samples: int) -> int:
    """Samples that a run goes through."""
    return work.steps * work.batch_size or work.epochs * num_samples


def places(worth: Mapping[str, float]) -> dict[str, float]:
    """Place of each device among all, from 1/n of the best to 1 of the last; of equals the first by name is before."""
    ranked = sorted(sorted(worth), key=lambda name: -worth[name])
    return {name: rank / len(ranked) for rank, name in enumerate(ranked, 1)}


def _loss(told: float, before: float) -> float:
    return told if 0 <= told <= FIGURE_MAX else before


def _sample_s(settings: Settings, outcome: Outcome, before: float) -> float:
    """Seconds for a sample; smaller batches than the job's only lower them: a step has costs of its own."""
    work, seconds = outcome.work, outcome.stats.get("seconds", 0.0)
    samples = samples_of(work, outcome.num_samples)
    if work.learns != ADAPTER or not samples or not is_time(seconds):
        return before
    is_whole = work.batch_size >= settings.work.batch_size or not before
    return seconds / samples if is_whole else min(seconds / samples, before)


def _rate(size_bytes: int, seconds: float, before: float) -> float:
    found = size_bytes / seconds if is_time(seconds) else 0.0
    if not RATE_MIN <= found <= RATE_MAX:
        return before
    return found if size_bytes >= WEIGHTY_BYTES else max(found, before)
