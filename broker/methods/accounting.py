"""What the noise of a job is worth: epsilon by the rounds that one device's data may be in.

Two fleets are neighbours if one device's updates are nothing in the one: it takes part, and its change is zero (zero-out,
REPLACE_SPECIAL of dp-accounting). Who is asked is no secret here: the draws follow from the job's seed, which devices are told.
So nothing is gained by sampling, and nothing is lost in rounds in which a device is not asked. What remains is k times the
Gaussian mechanism, which is the same as once with its noise divided by sqrt(k), and has an exact epsilon.

Of dp ``sample`` the neighbours are two data sets of a device, and the steps of its rounds count: see ``contracts.accounting``.

Source: Balle and Wang, arXiv 1805.06530 (exact epsilon of one Gaussian mechanism); Dong et al., arXiv 1905.02383, corollary 3.3
(k of them are one).
"""

import math
from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from fleetune.broker.jobs.privacy import Privacy
from fleetune.device_runtime.contracts.accounting import NEEDS, epsilon_of_steps, steps_of
from fleetune.device_runtime.contracts.fields import COUNT_MAX
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import lacking

_NO_WORK = LocalWork()


def epsilon_of(privacy: Privacy, rounds: int, work: LocalWork = _NO_WORK) -> float | None:
    """Epsilon, at the job's delta, of the device that was in the most rounds; None for a job without noise.

    ``work`` is the job's: of dp ``sample`` its steps count.

    Raises:
        ConfigError: the library is not installed.
    """
    if not privacy.is_on:
        return None
    if privacy.of_samples:
        return epsilon_of_steps([steps_of(privacy.asked(work, 1), rounds=rounds)], privacy.delta)
    return _epsilon(privacy.noise / math.sqrt(rounds), privacy.delta) if rounds else 0.0


def spending_of(privacy: Privacy, work: LocalWork = _NO_WORK) -> Callable[[int], float | None] | None:
    """Return :func:`epsilon_of` by rounds alone; None for a job without noise, of which nothing is counted."""
    return partial(epsilon_of, privacy, work=work) if privacy.is_on else None


def rounds_within(privacy: Privacy, work: LocalWork = _NO_WORK) -> int | None:
    """How many rounds one device may be in before its epsilon exceeds the job's most; None for any number.

    Raises:
        ConfigError: the library is not installed.
    """
    if not (privacy.is_on and privacy.most_epsilon):
        return None
    few, many = 0, 1
    while many <= COUNT_MAX and _is_within(privacy, many, work):
        few, many = many, 2 * many
    while many - few > 1:
        middle = (few + many) // 2
        few, many = (middle, many) if _is_within(privacy, middle, work) else (few, middle)
    return min(few, COUNT_MAX)


def _is_within(privacy: Privacy, rounds: int, work: LocalWork) -> bool:
    found = epsilon_of(privacy, rounds, work)
    return found is not None and found <= privacy.most_epsilon


@lru_cache(maxsize=4096)
def _epsilon(noise: float, delta: float) -> float:
    try:
        from dp_accounting import get_epsilon_gaussian
    except ModuleNotFoundError as exc:
        raise lacking(*NEEDS) from exc
    with np.errstate(divide="ignore"):  # the library's own, where delta is 0 in float64
        return float(get_epsilon_gaussian(noise, delta))
