"""Personalised transformer layer sharing (PTLS): which layers' adapters a device keeps, and which it shares.

Source: DropPEFT, arXiv 2503.10217, splits the layers into shared and personal ones. How it chooses them could not be read: the
importance, the number and the choice anew in each round are ours.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Doubles, Draws
from fleetune.device_runtime.tables import Table

Ranking = Callable[[Doubles, Draws], Indices]
"""(importance of the layers that were trained, lowest layer first; draws) -> their places, those first that stay personal."""


def personal_layers(work: LocalWork, importance: Sequence[float]) -> tuple[int, ...]:
    """Choose the layers that stay on the device after a run, lowest first.

    Only a layer that was trained in the run may stay, and one that was is always shared: so they may be fewer than
    ``work.personal``.

    Args:
        work: what was done; its seed draws.
        importance: of each layer, 0 if it was not trained.
    """
    trained = [i for i, value in enumerate(importance) if value > 0]
    count = min(work.personal, len(trained) - 1)
    if count <= 0:
        return ()
    values = np.array([importance[i] for i in trained], np.float64)
    order = RANKINGS[work.personal_by](values, Draws(work.seed, "personal", 0))
    return tuple(sorted(trained[place] for place in order[:count]))


def by_importance(importance: Doubles, draws: Draws) -> Indices:
    """Rank the most important first; of equal ones the lower."""
    return np.argsort(-importance, kind="stable")


def at_random(importance: Doubles, draws: Draws) -> Indices:
    """Rank by the device's seed alone, as a control."""
    return draws.permutation(len(importance))


def from_the_top(importance: Doubles, draws: Draws) -> Indices:
    """Rank the layers next to the head first, whatever their importance."""
    return np.arange(len(importance))[::-1]


RANKINGS: Table[Ranking] = Table(
    "ranking of layers", {"importance": by_importance, "random": at_random, "top": from_the_top}
)
