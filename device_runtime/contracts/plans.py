"""A layer plan says what each layer does in one step."""

from collections.abc import Iterable
from enum import IntEnum


class Mode(IntEnum):
    """What one layer does in one step."""

    DROP = 0
    """The identity: not run, not read, no memory."""
    FORWARD = 1
    """Runs frozen; its adapter gets no gradient."""
    TRAIN = 2
    """Runs, and its adapter gets a gradient."""


LayerPlan = tuple[Mode, ...]


def full(num_layers: int) -> LayerPlan:
    """Train every layer."""
    return (Mode.TRAIN,) * num_layers


def dropping(num_layers: int, dropped: Iterable[int]) -> LayerPlan:
    """Train every layer but those in ``dropped``, which become the identity."""
    gone = set(dropped)
    return tuple(Mode.DROP if i in gone else Mode.TRAIN for i in range(num_layers))


def active_layers(plan: LayerPlan) -> tuple[int, ...]:
    """Indices of the layers that run, lowest first."""
    return tuple(i for i, mode in enumerate(plan) if mode is not Mode.DROP)


def trained_layers(plan: LayerPlan) -> tuple[int, ...]:
    """Indices of the layers whose adapters get gradients, lowest first."""
    return tuple(i for i, mode in enumerate(plan) if mode is Mode.TRAIN)


def lowest_trained(plan: LayerPlan) -> int:
    """Index of the lowest trained layer, or ``len(plan)`` if none is: below it no backward runs."""
    return min(trained_layers(plan), default=len(plan))
