"""How much each layer's adapter is moved: the mean norm of its gradient over the steps that trained it."""

from collections.abc import Iterable, Sequence

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays
from fleetune.device_runtime.training.checkpoint import layout_problems


class Importance:
    """Sums over a run's steps, kept in its checkpoints.

    I_l = (sum over the steps that trained layer l of ||g_l||_2) / max(1, number of those steps), in float64: a layer that is
    often dropped does not look unimportant.

    Source: ours; PTLS of DropPEFT, arXiv 2503.10217, names importance and no formula.
    """

    def __init__(self, adapters: Sequence[frozenset[str]]) -> None:
        """Begin at zero; ``adapters`` are the names of each layer's tensors."""
        self._adapters = adapters
        self._norms = np.zeros(len(adapters))
        self._steps = np.zeros(len(adapters), np.int64)

    def add(self, grads: Arrays, trained: Iterable[int]) -> None:
        """Take in a step's gradients by tensor name; ``trained`` are the layers that it trained."""
        for layer in trained:
            squares = [_square(grads[name]) for name in sorted(self._adapters[layer] & grads.keys())]
            self._norms[layer] += np.sqrt(sum(squares))
            self._steps[layer] += 1

    @property
    def values(self) -> tuple[float, ...]:
        """One per layer; 0 for a layer that no step trained."""
        return tuple((self._norms / np.maximum(1, self._steps)).tolist())

    def columns(self) -> Arrays:
        """``norms`` float64 and ``steps`` int64, each (num_layers,), for a checkpoint."""
        return {"norms": self._norms, "steps": self._steps}

    def problems(self, found: Arrays) -> list[str]:
        """Why these are not columns of this run; checkpoints of earlier releases have none, and that is no problem."""
        said = layout_problems(found, self.columns()) if found else []
        return said or [f"{n}: negative or not finite" for n, a in found.items() if not _is_sum(a)]

    def restore(self, found: Arrays) -> None:
        """Go on from the columns of a checkpoint, or from zero where it has none."""
        held = found or Importance(self._adapters).columns()
        self._norms, self._steps = np.array(held["norms"]), np.array(held["steps"])


def _square(grad: Array) -> float:
    return float(np.square(grad, dtype=np.float64).sum())


def _is_sum(column: Array) -> bool:
    return bool(np.isfinite(column).all() and np.greater_equal(column, 0).all())
