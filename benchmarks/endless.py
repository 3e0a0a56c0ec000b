"""Ten thousand rounds of a job on disk in one process: do CPU seconds, memory, descriptors or disk of a round grow?"""

import tempfile
from collections.abc import Callable
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.measuring.processes import run_worker

AT = (200, 1_000, 2_000, 3_000, 5_000, 10_000)


def measure(say: Callable[[str], None], *, rounds: int = AT[-1]) -> dict[str, Any]:
    """One row for each of some rounds: milliseconds of the processor that a round of all took, and what they had by then."""
    with tempfile.TemporaryDirectory() as folder:
        found = run_worker(
            "endless", rounds, folder, *(number for number in AT if number <= rounds), threads=1
        )
    for line in table(found["rows"]):
        say(line)
    return {"benchmark": "endless", "rounds": rounds, **found}
