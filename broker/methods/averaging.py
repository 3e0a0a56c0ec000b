"""Averages of each tensor by itself: FedAvg, and FedAvg with server momentum."""

import numpy as np

from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import Strategy, add_values, init_sums
from fleetune.device_runtime.arrays import Arrays


def fedavg() -> Strategy:
    """Mean weighted by samples, of each tensor over the updates that hold it; unchanged where none does.

    The sums are exact, so the mean is the same bits in any order of arrival, and the mean of equal float32
    updates is that update (but for the sign of a zero).

    Of a LoRA that is FedIT: the mean of A and that of B. What B A then is differs from the mean of the devices' B A
    (``product`` has that), but for the devices that leave A frozen.

    Source: McMahan et al., arXiv 1602.05629, algorithm 1; FedIT: Zhang et al., arXiv 2305.05644.
    """

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        new = {n: sums.mean(n, np.float32) if sums.weights[n] else r.copy() for n, r in reference.items()}
        return new, state

    return Strategy(init_sums, add_values, finish)


def fedavgm(*, momentum: float = 0.9) -> Strategy:
    """FedAvg whose server step has momentum: m = momentum m + (mean - reference), new = reference + m.

    Source: Hsu et al., arXiv 1909.06335, section 4.
    """

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        new: Arrays = {}
        kept: Arrays = {}
        for name, value in reference.items():
            start = np.asarray(value, np.float64)
            delta = sums.mean(name) - start if sums.weights[name] else np.zeros(start.shape)
            speed = momentum * np.asarray(state.get(name, 0.0), np.float64) + delta
            new[name] = (start + speed).astype(np.float32)
            kept[name] = speed
        return new, kept

    return Strategy(init_sums, add_values, finish)
