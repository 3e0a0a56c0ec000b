"""Caesar's comparison in a small form: how many bytes each way to pack needs to be as good as fp32, in simulated fleets.

Every arm has as many rounds as the reference, which sends fp32 both ways. See ``measuring.comparison``.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.measuring.comparison import SEEDS, Comparison, Say
from fleetune.toolkit.simulation.records import SimulationReport


def limits(reference: SimulationReport) -> list[str]:
    """The same rounds."""
    return [f"rounds={reference.rounds}"]


COMPARISON = Comparison("caesar", of="fp32", limits=limits)


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = SEEDS, threads: int = 0) -> dict[str, Any]:
    """Run arms on cells, all or those named, and compare; see :meth:`Comparison.run`."""
    return COMPARISON.run(say, only=only, repeats=repeats, threads=threads)
