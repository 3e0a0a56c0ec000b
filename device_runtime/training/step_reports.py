"""What every step of a run came to, in 24 bytes a step."""

from array import array
from collections.abc import Mapping, Sequence
from typing import NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

_COLUMNS = ("loss", "active_layers", "seconds")


class StepReport(NamedTuple):
    """One finished step; ``step`` counts from 0."""

    step: int
    total_steps: int
    loss: float
    active_layers: float
    """Layers that ran; where rows have gates of their own, the mean over the rows."""
    seconds: float


class History(Sequence[StepReport]):
    """The reports of a run's steps, from the first on."""

    def __init__(self, total_steps: int, columns: Mapping[str, NDArray[np.float64]] | None = None) -> None:
        """``columns`` as of :meth:`columns`; None for none yet."""
        self._total_steps = total_steps
        self._columns = {
            name: array("d", [] if columns is None else columns[name].tolist()) for name in _COLUMNS
        }

    def append(self, report: StepReport) -> None:
        """Take in the next step's."""
        for name, column in self._columns.items():
            column.append(getattr(report, name))

    def columns(self) -> dict[str, NDArray[np.float64]]:
        """One float64 (num_steps,) for loss, active_layers and seconds."""
        return {name: np.array(column, np.float64) for name, column in self._columns.items()}

    def __len__(self) -> int:
        return len(self._columns["loss"])

    @overload
    def __getitem__(self, index: int) -> StepReport: ...
    @overload
    def __getitem__(self, index: slice) -> list[StepReport]: ...
    def __getitem__(self, index: int | slice) -> StepReport | list[StepReport]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        step = range(len(self))[index]
        loss, active_layers, seconds = (column[step] for column in self._columns.values())
        layers = int(active_layers) if active_layers.is_integer() else active_layers
        return StepReport(step, self._total_steps, loss, layers, seconds)
