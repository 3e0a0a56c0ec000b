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
    micro_tokens: int = 0
    """Rows times tokens, padding included, that run at a time; at least one row. 0: no bound. The tighter bound holds."""

    def together(self, size: int, tokens: int, lanes: int = 1) -> int:
        """Rows that run at a time, of ``size`` of ``tokens`` each (0, no sequence: as of 1).

        Parts are as few as the bounds allow, and as equal as leaves every lane full.
        """
        by_tokens = max(1, self.micro_tokens // max(1, tokens)) if self.micro_tokens else size
        most = max(1, min(size, self.micro_batch or size, by_tokens))
        equal = -(-size // -(-size // most)) if size else 0
        return min(most, -(-equal // lanes) * lanes)

    def widths(self, tokens: int) -> set[int]:
        """Widths at which rows of 1 to ``tokens`` take most memory: the widest, and that of which one row more runs at a time.

        Still narrower ones take at most a token for each of those rows more.
        """
        one_more = max(0, self.micro_tokens) // tokens + 1
        return {tokens, max(0, self.micro_tokens) // one_more or tokens}

    def check(self) -> None:
        """Raise ConfigError for a number below 0."""
        wrong = {
            "micro_batch": self.micro_batch,
            "saved_layers": self.saved_layers or 0,
            "micro_tokens": self.micro_tokens,
        }
        for name, number in wrong.items():
            if number < 0:
                raise ConfigError(f"memory plan: {name} must be at least 0, got {number}")


SAVE_ALL = MemoryPlan()
RECOMPUTE = MemoryPlan(saved_layers=0)
