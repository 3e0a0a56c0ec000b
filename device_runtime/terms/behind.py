"""How much of a device's own data stands behind an update: the least that it can be, whatever an aggregator draws."""

import math
from typing import NamedTuple

import msgspec

from fleetune.device_runtime.contracts.accounting import num_steps
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec

_HELD_MAX = 64
"""As ``training.held_out`` has it."""
_RATE_MAX = 0.95
"""As ``methods.shapes`` has it: no layer is dropped more often."""


class Behind(NamedTuple):
    """Of one piece of work."""

    samples: int
    """Different samples that its steps touch."""
    batch: int
    """Samples that a layer learns from in the smallest step."""
    steps: int


def behind(work: LocalWork, num_samples: int) -> Behind:
    """Count what is behind the update of ``work`` on ``num_samples`` rows of data.

    An epoch takes each row once, and its last batch is short where the batches do not come out even. The aggregator picks the
    seed, and so which batch comes when: of fewer steps than an epoch has, one may be the short one. Rows that are held out for
    measuring do not train. Work that hides samples draws its batches by a secret: what is expected of it counts.
    """
    if work.hides_samples:
        steps = num_steps(work)
        samples = (
            num_samples * -math.expm1(steps * math.log1p(-work.sample_rate))
            if work.sample_rate < 1
            else num_samples
        )
        return Behind(round(samples), round(work.sample_rate * num_samples), steps)
    size = max(1, work.batch_size)
    rows = num_samples - _held(work, num_samples)
    batches = max(1, -(-rows // size))
    short = rows - (batches - 1) * size
    steps = work.steps or work.epochs * batches
    samples = rows if steps >= batches else max(0, steps - 1) * size + short
    return Behind(samples, _ungated(short, work.policy), steps)


def num_used(work: LocalWork, num_samples: int, *, least_batch: int) -> int:
    """Return how many of the rows may train, so that no step of ``work`` has fewer than ``least_batch``; most often all.

    A short last batch would be a step on its few samples alone, and an aggregator can make the other steps vanish from an update.
    The rows to spare are the last of the data, fewer than ``least_batch`` where none are held out. Where nothing helps all are
    returned, and the work is to be declined.
    """
    if work.hides_samples or num_samples <= work.batch_size:
        return num_samples
    # Of rows that are all of one class none are held out.
    ways = (work, msgspec.structs.replace(work, held_out=0.0))
    fewer = range(num_samples, num_samples // 2, -1)
    return next((n for n in fewer if all(_is_even(way, n, least_batch) for way in ways)), num_samples)


def _is_even(work: LocalWork, num_samples: int, least_batch: int) -> bool:
    short = (num_samples - _held(work, num_samples)) % work.batch_size
    return short == 0 or short >= least_batch


def _held(work: LocalWork, num_samples: int) -> int:
    """Rows held out, as ``training.held_out`` counts them."""
    if not work.held_out or num_samples < 2:
        return 0
    return min(max(1, round(work.held_out * num_samples)), num_samples // 2, _HELD_MAX)


def _ungated(rows: int, policy: PolicySpec) -> int:
    """Rows of a batch that a layer learns from; gates by row leave it round((1 - rate) rows)."""
    if policy.gates != "row" or not policy.drop:
        return rows
    is_same_for_all = policy.shape == "uniform" and not policy.protected
    return round((1 - (policy.drop if is_same_for_all else _RATE_MAX)) * rows)
