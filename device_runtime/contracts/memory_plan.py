"""A memory plan says how a step is held in memory. It changes time and memory, and no result beyond rounding."""

from typing import NamedTuple

from fleetune.device_runtime.errors import ConfigError


class MemoryPlan(NamedTuple):
    """How the rows, activations and frozen weights of a step are held.

    Streaming changes no bit. A micro-batch changes the order of sums, recomputing at most that of a kernel's.
    """

    micro_batch: int = 0
    """Rows that run at a time; gradients are averaged over the batch. 0: the whole batch."""
    saved_layers: int | None = None
    """Trained layers, counted from the top, that keep their activations; those below run again. None: all of them."""
    streamed: bool = False
    """A layer's frozen weights leave resident memory when it has run; the next one's are fetched meanwhile."""

    def check(self) -> None:
        """Raise ConfigError for a number below 0."""
        wrong = {"micro_batch": self.micro_batch, "saved_layers": self.saved_layers or 0}
        for name, number in wrong.items():
            if number < 0:
                raise ConfigError(f"memory plan: {name} must be at least 0, got {number}")


SAVE_ALL = MemoryPlan()
RECOMPUTE = MemoryPlan(saved_layers=0)
