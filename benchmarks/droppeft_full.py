"""DropPEFT's comparison in its full form: hours; more devices, more rounds, all data, everything else as in ``droppeft``."""

from collections.abc import Sequence
from typing import Any

from benchmarks.droppeft import COMPARISON
from benchmarks.measuring.comparison import SEEDS, Say

FULL = COMPARISON._replace(overlays=("full.toml",))


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = SEEDS, threads: int = 0) -> dict[str, Any]:
    """As ``droppeft``."""
    return FULL.run(say, only=only, repeats=repeats, threads=threads, form="full")
