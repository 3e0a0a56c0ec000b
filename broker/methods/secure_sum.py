"""The mean of a round whose updates are whole numbers on a grid, added without looking at one, and its masks taken off.

With and without masks it is the same numbers, so the same bits.
"""

from collections.abc import Iterable

import numpy as np

from fleetune.broker.methods.strategy import Update
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.secure_sums.grid import added, mean_change, num_elements, read_numbers
from fleetune.device_runtime.contracts.secure_sums.masking import Unmasking, unmask
from fleetune.device_runtime.contracts.work import SumGrid


def mean_update(
    payloads: Iterable[bytes], reference: Arrays, grid: SumGrid, *, unmasking: Unmasking | None
) -> Update:
    """Return one update that stands for all of a round: their weighted mean, with weight 1.

    Args:
        payloads: of the round's updates, each read once.
        reference: the version that they start from.
        grid: the job's.
        unmasking: what takes the masks off; None if there are none.

    Raises:
        WireError: a payload of another length, or a sum that these devices cannot have.
    """
    total, count = np.zeros(num_elements(reference), np.uint64), 0
    for payload in payloads:
        added(total, read_numbers(payload, reference, grid), grid)
        count += 1
    if unmasking:
        unmask(total, unmasking, grid)
    change = mean_change(total, reference, grid, num_devices=count)
    values = {name: np.float64(reference[name]) + moved for name, moved in change.items()}
    return Update(values, reference, 1)
