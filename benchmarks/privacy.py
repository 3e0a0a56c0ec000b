"""Accuracy against epsilon in simulated fleets: by device, of a hundred, and by sample, of twenty devices.

The arms are the same work without noise, with the bound alone, and with noise at the aggregator, or in each step of each device
(``sample-``), for epsilon 8, 3 and 1.
"""

from collections.abc import Sequence
from typing import Any

from benchmarks.measuring.comparison import Comparison, Say
from fleetune.device_runtime.errors import UnknownName, choices

OF_DEVICES = Comparison("privacy", of="none", limits=lambda _: [], overlays=("hundred.toml",))
OF_SAMPLES = Comparison("sample_privacy", of="sample-none", limits=lambda _: [], overlays=("twenty.toml",))
CELLS = ("minilm-banking", "bge-mnli")


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = 1, threads: int = 0) -> dict[str, Any]:
    """Run arms on cells, all or those named, and compare; see :meth:`Comparison.run`."""
    both = (OF_DEVICES, OF_SAMPLES)
    known = (*CELLS, *(arm for one in both for arm in one.arms))
    if unknown := [name for name in only if name not in known]:
        raise UnknownName(f"no cell or arm {unknown[0]!r}; have: {choices(known)}")
    cells = [name for name in CELLS if name in only] or list(CELLS)
    found = {}
    for one in both:
        arms = [name for name in one.arms if name in only]
        if arms or not set(only) - set(CELLS):
            found[one.name] = one.run(
                say, only=[*cells, *arms], repeats=repeats, threads=threads, form=one.name
            )
    return {"benchmark": "privacy", "by": found}
