"""How many of its samples are behind a run's update in effect: what each has moved, and how much one of them outweighs others.

An aggregator has many ways to let few samples speak: a rate that falls or rises steeply, weight decay that erases earlier steps,
an adapter with which most samples have no gradient (Wen et al., "Fishing for User Data", arXiv 2202.00580), a policy or row gates
by which a layer learns once. All of them show in the norms of single samples' gradients. The measure is ours.
"""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Arrays, Indices
from fleetune.device_runtime.contracts.work import OptimizerSpec
from fleetune.device_runtime.engine.pulls import Pulls
from fleetune.device_runtime.training.checkpoint import layout_problems

_SQUARES_KEPT = 0.999
"""Adam's second moment keeps so much of a step."""


class Influence:
    """Sums over a run's steps, by layer and sample, kept in its checkpoints.

    s_li = sum over the steps t that train layer l of k_lt r_t g_ti, where g_ti is the norm of sample i's gradient (see
    :class:`Pulls`), r_t the learning rate, times Adam's and the clip's scale of the whole gradient, and k_lt the product of
    ``|1 - rate (weight_decay + proximal)|`` over the later steps that train the layer: what they leave of the step.
    """

    def __init__(self, spec: OptimizerSpec, *, num_layers: int, num_samples: int) -> None:
        """Begin at zero; the last row is the head's."""
        self._spec = spec
        self._sums = np.zeros((num_layers + 1, num_samples))
        self._moments = np.zeros(3)
        """Adam's, of the norms in the body and at the head, and the share of them that is there."""

    def add(
        self,
        samples: Indices,
        pulls: Pulls | None,
        *,
        trained: Iterable[int],
        rate: float,
        clip: float = 1.0,
        gates: NDArray[np.bool_] | None = None,
    ) -> None:
        """Take in a step.

        Args:
            samples: places (B,) of its rows in the data set.
            pulls: of its rows; None, from a backend that does not measure them: all alike.
            trained: the layers that it trains; the head learns in every step.
            rate: learning rate.
            clip: what the gradient was multiplied by.
            gates: (layers, B), which rows went through which layer.
        """
        even = np.full(len(samples), 1 / max(1, len(samples)))
        body, head = self._scaled(pulls or Pulls(even, even), clip)
        layers, of_head = [*trained], len(self._sums) - 1
        with np.errstate(over="ignore", invalid="ignore"):  # found at the end
            self._sums[[*layers, of_head]] *= abs(1 - rate * (self._spec.weight_decay + self._spec.proximal))
            for layer in layers:
                np.add.at(self._sums[layer], samples, rate * body * (1 if gates is None else gates[layer]))
            np.add.at(self._sums[of_head], samples, rate * head)

    @property
    def effective(self) -> float:
        """Samples behind the update of the layer, or head, that has the fewest: ``min((sum s)^2 / sum s^2, 2 sum s / max s)``.

        Of n that weigh alike it is n; where it is n no sample has more than 2 / n of the whole. 0 if nothing was moved, or more
        than a float holds.
        """
        if not np.isfinite(self._sums).all():
            return 0.0
        return min((_effective(row) for row in self._sums if row.any()), default=0.0)

    def columns(self) -> Arrays:
        """``sums`` float64 (num_layers + 1, num_samples) and ``moments`` float64 (3,), for a checkpoint."""
        return {"sums": self._sums, "moments": self._moments}

    def problems(self, found: Arrays) -> list[str]:
        """Why these are not columns of this run; checkpoints of earlier releases have none, and that is no problem."""
        said = layout_problems(found, self.columns()) if found else []
        return said or [f"{n}: negative or NaN" for n, a in found.items() if not np.greater_equal(a, 0).all()]

    def restore(self, found: Arrays) -> None:
        """Go on from the columns of a checkpoint; where it has none, the steps before it count for nothing."""
        held = found or {name: np.zeros_like(column) for name, column in self.columns().items()}
        self._sums, self._moments = np.array(held["sums"]), np.array(held["moments"])

    def _scaled(self, pulls: Pulls, clip: float) -> Pulls:
        """What of the pulls comes to the rate: clipped, and over the root of Adam's mean square."""
        body, head = (clip * pull for pull in pulls)
        if self._spec.name != "adamw":
            return Pulls(body, head)
        squares = np.array([np.square(body).sum(), np.square(head).sum(), 1.0])
        self._moments = _SQUARES_KEPT * self._moments + (1 - _SQUARES_KEPT) * squares
        over = np.sqrt(self._moments[:2] / self._moments[2])
        return Pulls(
            *(pull / size if size > 0 else pull for pull, size in zip((body, head), over, strict=True))
        )


def _effective(sums: NDArray[np.float64]) -> float:
    shares = sums / sums.max()
    return float(min(shares.sum() ** 2 / np.square(shares).sum(), 2 * shares.sum()))
