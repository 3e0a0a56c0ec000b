"""A mask on which all devices of a job agree, by vote; it knows no codec and no strategy.

MPFL (arXiv 2312.03889) has devices train and send pruning masks, and makes a consensus of them, until it is stable; then
they train with it. Its rule is not public. Ours: in a voting round devices send whole updates, each of which votes for the
elements that it moved farthest; those with most votes are the mask of the rounds until the next vote.
"""

from collections.abc import Iterable, Mapping

import numpy as np
from numpy.typing import NDArray

from fleetune.broker.methods.strategy import Update
from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.contracts.codecs.largest import largest, num_of
from fleetune.device_runtime.contracts.masks import Mask, mask_of


def is_vote(trained: int, every: int) -> bool:
    """Whether a training round, from 1, is a voting round: the first, and with ``every`` above 0 each that many later."""
    return trained == 1 or (every > 0 and (trained - 1) % every == 0)


def consensus(updates: Iterable[Update], reference: Mapping[str, Array], *, share: float) -> Mask:
    """Return the elements with most votes, at most ``share`` of all; equal ones go by name and place.

    Each update has a vote for ``share`` of all elements, those that it moved farthest; what it left as it was gets none, and an
    element without a vote is not in the mask. No mask if there is no vote. The order of the updates changes nothing.
    """
    count = sum(value.size for value in reference.values())
    votes, allowed = np.zeros(count, np.int64), num_of(share, count)
    for update in updates:
        votes += largest(_moved(update, reference), allowed)
    return mask_of(largest(votes, allowed), reference) if count else {}


def _moved(update: Update, reference: Mapping[str, Array]) -> NDArray[np.float64]:
    """How far each element was moved, of all tensors by name."""
    start, blank = update.reference, np.zeros(0)
    pieces = (
        np.abs(update.values[name] - np.float64(start[name]))
        if name in update.values
        else np.zeros(value.shape)
        for name, value in sorted(reference.items())
    )
    return np.concatenate([blank, *(piece.reshape(-1) for piece in pieces)])
