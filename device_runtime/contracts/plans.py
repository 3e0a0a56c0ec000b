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
    BYPASS = 3
    """Runs; on the way back the gradient goes around it unchanged, and its adapter gets none."""
    BARE = 4
    """Runs without its LoRA: every B counts as zeros, and its adapter gets no gradient."""


LayerPlan = tuple[Mode, ...]


def full(num_layers: int) -> LayerPlan:
    """Train every layer."""
    return (Mode.TRAIN,) * num_layers


def frozen(num_layers: int) -> LayerPlan:
    """Run every layer, train none."""
    return (Mode.FORWARD,) * num_layers


def dropping(num_layers: int, dropped: Iterable[int]) -> LayerPlan:
    """Train every layer but those in ``dropped``, which become the identity."""
    gone = set(dropped)
    return tuple(Mode.DROP if i in gone else Mode.TRAIN for i in range(num_layers))


def active_layers(plan: LayerPlan) -> tuple[int, ...]:
    """Indices of the layers that run, lowest first."""
    return tuple(i for i, mode in enumerate(plan) if mode is not Mode.DROP)


def trained_layers(plan: LayerPlan) -> tuple[int, ...]:
    """Indices of the layers whose adapters get gradients, lowest first."""
    return _with_mode(plan, Mode.TRAIN)


def learnable(plan: LayerPlan, learning: Collection[int]) -> LayerPlan:
    """``plan`` with those layers frozen that have nothing to train, or to run without; ``learning`` are the others."""
    own = (Mode.TRAIN, Mode.BARE)
    return tuple(Mode.FORWARD if mode in own and i not in learning else mode for i, mode in enumerate(plan))


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
    around: frozenset[int] = frozenset()
    """Those that run and that the gradient goes around."""
    bare: frozenset[int] = frozenset()
    """Those that run without their LoRA."""
    boundary: int = 0
    """The layer whose input may be kept from step to step: no layer below learns."""

    @property
    def below(self) -> tuple[int, ...]:
        """Those that run below the boundary."""
        return tuple(i for i in self.layers if i < self.boundary)

    @property
    def above(self) -> tuple[int, ...]:
        """Those that run from the boundary on."""
        return tuple(i for i in self.layers if i >= self.boundary)

    @property
    def back(self) -> tuple[int, ...]:
        """Those that the way back goes through, trained or not."""
        return tuple(i for i in self.layers if i >= self.lowest and i not in self.around)

    @property
    def rerun(self) -> tuple[int, ...]:
        """Those that run again on the way back."""
        return self.back[: len(self.back) - len(self.saved)]


def route(plan: LayerPlan, memory: MemoryPlan = SAVE_ALL, *, cache_below: int = -1) -> Route:
    """Work out which layers a step runs there and back.

    Args:
        plan: one mode per layer.
        memory: how many of those on the way back save their activations.
        cache_below: the boundary, if it lies below the lowest trained layer, where it is by itself; -1 for none given.
    """
    layers, trained = active_layers(plan), trained_layers(plan)
    lowest = min(trained, default=len(plan))
    found = Route(
        layers,
        lowest,
        trained,
        (),
        frozenset(_with_mode(plan, Mode.BYPASS)),
        frozenset(_with_mode(plan, Mode.BARE)),
        lowest if cache_below < 0 else min(lowest, cache_below),
    )
    back = found.back
    count = len(back) if memory.saved_layers is None else min(memory.saved_layers, len(back))
    return found._replace(saved=back[len(back) - count :])


def _with_mode(plan: LayerPlan, wanted: Mode) -> tuple[int, ...]:
    return tuple(i for i, mode in enumerate(plan) if mode is wanted)
