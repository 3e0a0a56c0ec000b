"""DropPEFT's comparison in its full form: hours; everything else as in ``droppeft``."""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.droppeft import SEEDS
from benchmarks.droppeft import measure as small


def measure(
    say: Callable[[str], None], *, only: Sequence[str] = (), repeats: int = SEEDS, threads: int = 0
) -> dict[str, Any]:
    """As ``droppeft``; more devices, more rounds, all data."""
    return small(say, only=only, repeats=repeats, threads=threads, form="full")
