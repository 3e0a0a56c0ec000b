"""The mean of changes as differential privacy has it: bounded changes of equal weight, noise, a fixed number of devices.

Around strategies whose next version follows from the mean alone: all that they do with it is post-processing.
"""

from collections.abc import Collection

import numpy as np

from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import (
    VALUE_MAX,
    Strategy,
    Update,
    add_to_sums,
    check_values,
    init_sums,
)
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.gaussian import Source, bounded, change_of, gaussian

OF_MEANS = ("fedavg", "fedavgm")
"""Strategies that need no more than the mean."""


def private_mean(
    strategy: Strategy, privacy: Privacy, *, expected: int, still: Collection[str], source: Source
) -> Strategy:
    """Give a strategy a mean in which one device's part is bounded and hidden.

    The sum of the changes is divided by ``expected``, however many came: a device that is missing is a change of nothing, and
    what one can do to the mean does not grow where few came. Every update weighs 1: numbers of samples are not used. Every
    tensor that the work may train has noise, whoever sent it.

    Args:
        strategy: of OF_MEANS.
        privacy: where the aggregator is to add noise (``central``) it also bounds each change, again and after its codec.
        expected: devices that a round asks.
        still: tensors that no device trains: they stay as they are, whatever comes of them.
        source: of the noise.

    Source: DP-FedAvg, McMahan et al., arXiv 1710.06963, algorithm 1 with the fixed-denominator estimator. Theirs divides by the
    expected total weight under Poisson sampling; ours by the number that is drawn.
    """

    def init(reference: Arrays) -> Sums:
        return init_sums({name: value for name, value in reference.items() if name not in still})

    def add(sums: Sums, update: Update) -> Sums:
        values = {name: value for name, value in update.values.items() if name not in still}
        check_values(sums, values, 1)
        change = change_of(values, update.reference)
        if privacy.is_central:
            change = dict(bounded(change, privacy.clip).change)
        return add_to_sums(sums, change, 1)

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        values = {}
        for name in sorted(sums.shapes):
            total = sums.total(name)
            if privacy.is_central:
                total = total + privacy.noise * privacy.clip * gaussian(total.shape, source)
            moved = np.add(reference[name], total / expected, dtype=np.float64)
            values[name] = np.clip(moved, -VALUE_MAX, VALUE_MAX)
        mean = strategy.add(strategy.init(reference), Update(values, reference, 1))
        return strategy.finish(mean, reference, state)

    return Strategy(init, add, finish)
