"""Accuracy against epsilon, by device, in simulated fleets of a hundred devices: what hiding each of them costs.

The arms are the same work without noise, with the bound alone, and with noise at the aggregator for epsilon 8, 3 and 1.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.measuring.comparison import Comparison, Say

COMPARISON = Comparison("privacy", of="none", limits=lambda _: [], overlays=("hundred.toml",))
CELLS = ("minilm-banking", "bge-mnli")


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = 1, threads: int = 0) -> dict[str, Any]:
    """Run arms on cells, all or those named, and compare; see :meth:`Comparison.run`."""
    cells = [name for name in CELLS if name in only] or list(CELLS)
    arms = [name for name in only if name not in CELLS]
    return COMPARISON.run(say, only=[*cells, *arms], repeats=repeats, threads=threads)
