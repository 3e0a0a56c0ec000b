"""What steps of DP-SGD are worth: epsilon of one sample, by a Rényi accountant.

Two data sets are neighbours if one has one sample more. Batches are drawn by Poisson sampling. How many samples a device has is
no secret: the mean is taken over as many as a batch is expected to have.

Source: Abadi et al., arXiv 1607.00133; Mironov, Talwar and Zhang, arXiv 1908.10530, as dp-accounting has them.
"""

import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Annotated

import msgspec
from msgspec import Meta

from fleetune.device_runtime.contracts.fields import COUNT_MAX
from fleetune.device_runtime.contracts.work import (
    ADAPTER,
    SAMPLE_NOISE_MAX,
    SAMPLE_RATE_MIN,
    LocalWork,
)
from fleetune.device_runtime.errors import lacking

NEEDS = "dp", "dp-accounting", "privacy"
"""What needs which library, and the extra that brings it: of :func:`lacking`."""
DELTA = 1e-5
"""Where nobody says another."""


class Steps(msgspec.Struct, frozen=True):
    """So many steps of one kind."""

    noise: Annotated[float, Meta(gt=0, le=SAMPLE_NOISE_MAX)]
    """Standard deviation on the sum of the gradients, in the largest norm of one."""
    rate: Annotated[float, Meta(gt=0, le=1)]
    """Chance of a sample to be in a batch."""
    count: Annotated[int, Meta(ge=0, le=COUNT_MAX)]


def sampling_problems(work: LocalWork) -> Iterator[str]:
    """Yield what is not given of DP-SGD, and what cannot be had beside it: it would tell of samples what no noise hides."""
    numbers = {name: getattr(work, name) for name in ("sample_clip", "sample_noise", "sample_rate")}
    if not any(numbers.values()):
        return
    if missing := [name for name, number in numbers.items() if not number > 0]:
        yield f"dp sample: {' and '.join(missing)} must be above 0"
    elif work.sample_rate < SAMPLE_RATE_MIN:
        yield f"dp sample: sample_rate must be at least {SAMPLE_RATE_MIN:g}, got {work.sample_rate:g}"
    for name, why in _TELLING.items():
        if getattr(work, name):
            yield f"dp sample: {name} {why}; leave it out"
    if work.learns != ADAPTER:
        yield f"dp sample: {work.learns} have no noise"
    if work.policy.gates == "row":
        yield "dp sample: gates by row depend on how many samples a batch has; gates 'batch'"
    if work.policy.protect == "effect":
        yield "dp sample: protect 'effect' measures layers on the samples; 'ends'"


_TELLING = {
    "mask": "is made from gradients without noise",
    "personal": "keeps back layers that the samples choose",
    "held_out": "measures samples, and no figure is told",
    "histogram": "counts samples without noise",
    "noise": "is of dp on whole updates",
    "most_norm": "is of dp on whole updates",
}
"""Fields of the work, and what each has against DP-SGD."""


def num_steps(work: LocalWork) -> int:
    """Steps of DP-SGD: an epoch has as many as take each sample once on average."""
    return work.steps or work.epochs * math.ceil(1 / work.sample_rate)


def steps_of(work: LocalWork, *, rounds: int = 1) -> Steps:
    """What the data of a device is in for with ``rounds`` of this work, which hides samples."""
    return Steps(work.sample_noise, work.sample_rate, min(COUNT_MAX, rounds * num_steps(work)))


def epsilon_of_steps(taken: Iterable[Steps], delta: float) -> float:
    """Epsilon of one sample after all of these steps, at ``delta``.

    Raises:
        ConfigError: the library is not installed.
    """
    kinds: dict[tuple[float, float], int] = {}
    for steps in taken:
        kinds[steps.noise, steps.rate] = kinds.get((steps.noise, steps.rate), 0) + steps.count
    return _epsilon(tuple(sorted((*kind, count) for kind, count in kinds.items() if count)), delta)


@lru_cache(maxsize=4096)
def _epsilon(kinds: tuple[tuple[float, float, int], ...], delta: float) -> float:
    try:
        from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
        from dp_accounting.rdp import RdpAccountant
    except ModuleNotFoundError as exc:
        raise lacking(*NEEDS) from exc
    accountant = RdpAccountant()
    with _without_warnings():
        for noise, rate, count in kinds:
            accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta)) if kinds else 0.0


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Let the library not tell of Rényi orders that it leaves out: without them its bound is higher, and holds."""
    absl = logging.getLogger("absl")
    before = absl.level
    absl.setLevel(logging.ERROR)
    try:
        yield
    finally:
        absl.setLevel(before)
