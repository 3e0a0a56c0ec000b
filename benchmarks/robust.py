"""A fifth of twenty devices lies: what it costs with FedAvg as it was, with the default bounds, and with robust means.

Every arm has as many rounds as ``honest``, the default with nobody lying. See ``measuring.comparison``; what the liars do is in
``robust/attacks.py``.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.measuring.comparison import SEEDS, Comparison, Say
from fleetune.toolkit.simulation.records import SimulationReport


def limits(reference: SimulationReport) -> list[str]:
    """The same rounds."""
    return [f"rounds={reference.rounds}"]


COMPARISON = Comparison("robust", of="honest", limits=limits)


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = SEEDS, threads: int = 0) -> dict[str, Any]:
    """Run arms on cells, all or those named, and compare; see :meth:`Comparison.run`."""
    return COMPARISON.run(say, only=only, repeats=repeats, threads=threads)
