"""DropPEFT's comparison in a small form: what each arm costs until it is as good as federated LoRA, in simulated fleets.

Every other arm has as much virtual time as federated LoRA takes, and twice its rounds at most. See ``measuring.comparison``.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.measuring.comparison import SEEDS, Comparison, Say
from fleetune.toolkit.simulation.records import SimulationReport

ROUNDS_MORE = 2


def limits(reference: SimulationReport) -> list[str]:
    """The same time, whatever the number of rounds."""
    return [f"until_s={reference.time_s}", f"rounds={ROUNDS_MORE * reference.rounds}"]


COMPARISON = Comparison("droppeft", of="fedlora", limits=limits)


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = SEEDS, threads: int = 0) -> dict[str, Any]:
    """Run arms on cells, all or those named, and compare; see :meth:`Comparison.run`."""
    return COMPARISON.run(say, only=only, repeats=repeats, threads=threads)
