"""Devices that do not do as they are told, for simulations: ``fleet.code = "attacks.py:mixed"``; every fifth device is one.

Each function is (number of a device, its workbench) -> the workbench that its agent gets. They change what a device says and
sends, as a device of somebody's own making would; the product's agent sends it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.class_means import COUNTS, SQUARES, SUMS

EVERY = 5
HUGE = 2**29
"""Samples: the most that an aggregator takes."""
SLY = 2.9
"""Just below the bounds on weight and length, which are 3 and 5."""
Spoil = Callable[[Arrays, Arrays], Arrays]
"""(reference, what was made) -> what is sent instead"""


def mixed(number: int, workbench: Workbench) -> Workbench:
    """Of four such devices each one another attack."""
    kinds = (zeros, flipped, scaled, drawn)
    return kinds[number // EVERY % len(kinds)](number, workbench)


def zeros(number: int, workbench: Workbench) -> Workbench:
    """A model of zeros, of a huge number of samples."""
    return _spoiled(
        number, workbench, lambda _, made: {n: np.zeros_like(v) for n, v in made.items()}, samples=HUGE
    )


def flipped(number: int, workbench: Workbench) -> Workbench:
    """The opposite of what was learned."""
    return _spoiled(number, workbench, _times(-1.0))


def scaled(number: int, workbench: Workbench) -> Workbench:
    """A hundred times what was learned."""
    return _spoiled(number, workbench, _times(100.0))


def drawn(number: int, workbench: Workbench) -> Workbench:
    """Standard normal values."""
    rng = np.random.default_rng(number)
    return _spoiled(
        number,
        workbench,
        lambda _, made: {n: _like(v, rng.standard_normal(v.shape)) for n, v in made.items()},
    )


def idle(number: int, workbench: Workbench) -> Workbench:
    """No attack, but a control: it trains nothing, and weighs one sample, that of its class sums."""
    if number % EVERY:
        return workbench
    honest = workbench.class_sums
    assert honest

    def class_sums(work: Any, adapter: Arrays) -> tuple[Arrays, Mapping[str, float]]:
        sums, stats = honest(work, adapter)
        first = np.arange(len(sums[COUNTS])) == int(np.argmax(sums[COUNTS]))
        share = np.where(first, 1 / max(1.0, float(sums[COUNTS].max())), 0.0)
        parts = {n: _like(v, v * share.reshape(-1, *[1] * (v.ndim - 1))) for n, v in sums.items()}
        return parts | {COUNTS: first.astype(np.float32)}, stats

    def start(work: Any, adapter: Arrays) -> Any:
        return _Training(workbench.start(work, adapter), adapter, lambda reference, _: reference)

    return workbench._replace(start=start, class_sums=class_sums, num_samples=1)


def sly(number: int, workbench: Workbench) -> Workbench:
    """The opposite of what was learned, just as long and just as heavy as the default bounds let pass."""
    samples = int(SLY * workbench.num_samples)
    return _spoiled(number, workbench, _times(-SLY), samples=samples)


def knowing(number: int, workbench: Workbench) -> Workbench:
    """As ``sly``, but it goes along with the way that the model went since it was asked last: it does not seem to be against."""
    seen: list[Arrays] = []

    def spoil(reference: Arrays, made: Arrays) -> Arrays:
        if not seen or seen[-1] is not reference:
            seen[:-1], seen[1:] = [], [reference]
        before = seen[0]
        moved = {n: np.float64(v) - reference[n] for n, v in made.items()}
        way = {n: np.float64(reference[n]) - before[n] for n in moved}
        square = sum(float(np.square(w).sum()) for w in way.values())
        if not square:
            return made
        along = sum(float((moved[n] * w).sum()) for n, w in way.items()) / square
        return {n: _like(made[n], reference[n] - SLY * (v - 2 * along * way[n])) for n, v in moved.items()}

    return _spoiled(number, workbench, spoil, samples=int(SLY * workbench.num_samples), is_honest_first=True)


class _Training:
    """A run whose outcome is another; all else is the run's own, but for figures that look good."""

    def __init__(self, training: Any, start: Arrays, spoil: Spoil) -> None:
        self._training, self._start, self._spoil = training, start, spoil

    def __getattr__(self, name: str) -> Any:
        return getattr(self._training, name)

    @property
    def adapter(self) -> Arrays:
        return self._spoil(self._start, self._training.adapter)

    @property
    def stats(self) -> Mapping[str, float]:
        return {**self._training.stats, "loss": 0.0}


def _spoiled(
    number: int, workbench: Workbench, spoil: Spoil, *, samples: int = 0, is_honest_first: bool = False
) -> Workbench:
    if number % EVERY:
        return workbench
    honest, told = workbench.class_sums, samples or workbench.num_samples
    assert honest

    def class_sums(work: Any, adapter: Arrays) -> tuple[Arrays, Mapping[str, float]]:
        sums, stats = honest(work, adapter)
        if is_honest_first:
            return sums, stats
        return _plausible(sums, spoil({n: np.zeros_like(v) for n, v in sums.items()}, sums), samples), stats

    def start(work: Any, adapter: Arrays) -> Any:
        return _Training(workbench.start(work, adapter), adapter, spoil)

    return workbench._replace(start=start, class_sums=class_sums, num_samples=told)


def _plausible(honest: Arrays, spoiled: Arrays, samples: int) -> Arrays:
    """Sums that an aggregator cannot tell from those of samples: whole counts, and squares that allow the sums."""
    counts = np.asarray(honest[COUNTS], np.float64)
    if samples:
        counts = np.full(len(counts), samples // len(counts), np.float64)
    least = 1.01 * np.square(np.asarray(spoiled[SUMS], np.float64)).sum(1) / np.maximum(counts, 1)
    totals = np.where(counts[:, None] > 0, spoiled[SUMS], 0)
    squares = np.where(counts > 0, np.maximum(honest[SQUARES], least), 0)
    return {
        SUMS: _like(spoiled[SUMS], totals),
        COUNTS: counts.astype(np.float32),
        SQUARES: squares.astype(np.float32),
    }


def _times(factor: float) -> Spoil:
    def spoil(reference: Arrays, made: Arrays) -> Arrays:
        return {n: _like(v, reference[n] + factor * (np.float64(v) - reference[n])) for n, v in made.items()}

    return spoil


def _like(value: Any, other: Any) -> Any:
    return np.asarray(other, value.dtype)
