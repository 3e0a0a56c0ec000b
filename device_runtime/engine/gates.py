"""Gates by row: a layer runs on some rows of a batch, and is the identity for the others."""

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode
from fleetune.device_runtime.errors import ConfigError

Gates = NDArray[np.bool_]
"""(layers, rows): whether the row runs through the layer."""


def check_gates(gates: Gates, plan: LayerPlan, num_rows: int) -> None:
    """Raise ConfigError for gates of another type or shape than a batch of ``num_rows`` has."""
    shape = (len(plan), num_rows)
    if gates.dtype != np.bool_ or gates.shape != shape:
        raise ConfigError(f"gates: expected bool{list(shape)}, got {gates.dtype}{list(gates.shape)}")


def open_layers(plan: LayerPlan, gates: Gates) -> LayerPlan:
    """``plan`` without the layers that no row runs through."""
    return tuple(mode if row.any() else Mode.DROP for mode, row in zip(plan, gates, strict=True))


def lowest_shut(gates: Gates) -> int:
    """The lowest layer that some row does not run through; the number of layers if there is none."""
    shut = np.flatnonzero(~gates.all(axis=1))
    return int(shut[0]) if len(shut) else len(gates)


def some_rows(gate: NDArray[np.bool_]) -> Indices | None:
    """Rows that run through a layer; None for all."""
    return None if gate.all() else np.flatnonzero(gate)
