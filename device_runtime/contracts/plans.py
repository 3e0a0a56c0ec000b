"""A layer plan says what each layer does in one step; its route, which layers run there, and which back."""

from collections.abc import Collection, Iterable
from enum import IntEnum
from typing import NamedTuple

from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan


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


def learnable(plan: LayerPlan, learning: Collection[int]) -> LayerPlan:
    """``plan`` with those layers frozen that have nothing to train; ``learning`` are the others, as of a manifest."""
    return tuple(
        Mode.FORWARD if mode is Mode.TRAIN and i not in learning else mode for i, mode in enumerate(plan)
    )


class Route(NamedTuple):
    """The layers of one step by what happens to them; all are indices, lowest first."""

    layers: tuple[int, ...]
    """Those that run."""
    lowest: int
    """The lowest trained one, or the number of layers if none is: below it no backward runs."""
    trained: tuple[int, ...]
    """Those whose adapters get gradients."""
    saved: tuple[int, ...]
    """Those that keep their activations for the way back."""

    @property
    def below(self) -> tuple[int, ...]:
        """Those that run and that the way back does not reach."""
        return tuple(i for i in self.layers if i < self.lowest)

    @property
    def back(self) -> tuple[int, ...]:
        """Those that the way back goes through, trained or not."""
        return tuple(i for i in self.layers if i >= self.lowest)

    @property
    def rerun(self) -> tuple[int, ...]:
        """Those that run again on the way back."""
        return self.back[: len(self.back) - len(self.saved)]


def route(plan: LayerPlan, memory: MemoryPlan = SAVE_ALL) -> Route:
    """Work out which layers a step runs there and back; ``memory`` says how many of the latter save their activations."""
    layers, trained = active_layers(plan), trained_layers(plan)
    lowest = min(trained, default=len(plan))
    back = [i for i in layers if i >= lowest]
    count = len(back) if memory.saved_layers is None else min(memory.saved_layers, len(back))
    return Route(layers, lowest, trained, tuple(back[len(back) - count :]))
