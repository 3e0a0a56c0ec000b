"""What a dropped layer takes: peak memory, mapped weights and step time of MiniLM by the number of active layers."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit.benchmark import run_worker
from toolkit.export import export
from toolkit.models import packaged_model

BATCH, SEQ, STEPS, THREADS = 16, 64, 8, 2


def measure(say: Callable[[str], None]) -> dict[str, Any]:
    """One row per number of active layers, from all to one."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        artifact = Path(folder) / "artifact"
        report = export(
            packaged_model(), task="sequence-classification", num_labels=77, out=artifact, on_progress=say
        )
        for active in range(report.num_layers, 0, -1):
            found = run_worker(
                "device_step", artifact, BATCH, SEQ, STEPS, THREADS, f"active:{active}", threads=THREADS
            )
            row = {
                "active_layers": active,
                **{n: round(found[n], 1) for n in ("peak_mb", "mapped_weights_mb", "step_ms")},
            }
            say(", ".join(f"{name} {value}" for name, value in row.items()))
            rows.append(row)
    return {"benchmark": "memory", "batch": [BATCH, SEQ], "threads": THREADS, "rows": rows}
