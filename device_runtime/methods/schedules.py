"""How the mean share of layers dropped goes over the steps of all rounds: ``(drop, horizon, step) -> drop``.

That dropping which falls to nothing beats dropping that stays or rises is Elhoushi et al.'s finding for pre-training (arXiv
2609.05275: linear, to the last step). Ours is the horizon: from there on all layers run, and the model that is trained is the one
that is evaluated.
"""

from collections.abc import Callable

from fleetune.device_runtime.tables import Table


def constant(drop: float, horizon: int, step: int) -> float:
    """``drop`` in every step."""
    return drop


def falling(drop: float, horizon: int, step: int) -> float:
    """From ``drop`` at step 0 in a straight line to 0 at ``horizon``, and 0 from there on."""
    return drop * (horizon - step) / horizon if step < horizon else 0.0


def tail(drop: float, horizon: int, step: int) -> float:
    """``drop`` before ``horizon``, 0 from there on."""
    return drop if step < horizon else 0.0


SCHEDULES: Table[Callable[[float, int, int], float]] = Table(
    "schedule", {"constant": constant, "falling": falling, "tail": tail}
)
