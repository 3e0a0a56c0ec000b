"""What a layer policy is: ``(step, draws, state) -> LayerPlan``; steps are counted through all rounds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.contracts.plans import LayerPlan
from fleetune.device_runtime.contracts.work import PolicySpec
from fleetune.device_runtime.draws import Draws

PolicyState = dict[str, Any]
"""What a policy remembers between steps; JSON types only, because the checkpoint holds it."""
Policy = Callable[[int, Draws, PolicyState], LayerPlan]
RowGates = Callable[[int, Draws, PolicyState, int], NDArray[np.bool_]]
"""(step, draws, state, rows of the batch) -> (layers, rows): whether the row runs through the layer. Asked after the plan."""


class PolicyFamily(NamedTuple):
    """A policy before it has its numbers."""

    make: Callable[[int, PolicySpec], Policy]
    uses: tuple[str, ...] = ()
    """Fields of the spec that it reads; any other must stand at its default."""
    needs: tuple[str, ...] = ()
    """Those of them that must be at least 1."""
