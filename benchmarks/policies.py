"""What a layer policy learns and costs on one device: real pretrained encoders, a task that needs depth beside one that does not.

Every policy begins with the class-mean head and has the hidden cache. Seconds are of the processor, of the steps alone.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.cells import CELLS, Cell, drawn
from benchmarks.measuring.figures import table
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import class_head
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.training.machine import Machine

STEPS, TRAIN_LINES, TEST_LINES = 240, 2000, 600
_FALLING = {"schedule": "falling", "horizon": int(0.65 * STEPS)}
POLICIES = {
    "full": PolicySpec(),
    "head": PolicySpec(name="head"),
    "suffix 1": PolicySpec(name="suffix", drop=11 / 12),
    "suffix 3": PolicySpec(name="suffix", drop=0.75),
    "suffix 6": PolicySpec(name="suffix", drop=0.5),
    "growing 3, 6": PolicySpec(name="growing", drop=0.5, width=3, period=int(0.4 * STEPS)),
    "dropbp 6 of 12": PolicySpec(name="dropbp", drop=0.5),
    "dropbp in suffix 6": PolicySpec(name="dropbp", drop=0.5, width=6),
    "coto in suffix 6": PolicySpec(name="coto", drop=0.5, width=6, **_FALLING),
    "half dropped": PolicySpec(name="exact-k", drop=0.5),
    "quarter dropped": PolicySpec(name="exact-k", drop=0.25),
    "quarter, ends protected": PolicySpec(name="exact-k", drop=0.25, protected=4),
    "quarter, by effect, falling": PolicySpec(
        name="exact-k", drop=0.25, protected=5, protect="effect", **_FALLING
    ),
    "quarter of the rows": PolicySpec(name="exact-k", drop=0.25, protected=5, gates="row", **_FALLING),
}
WORK = {
    "bge-mnli": LocalWork(seq_len=64, optimizer=OptimizerSpec(lr=1e-3, warmup_steps=20, clip_norm=1.0)),
    "bge-banking": LocalWork(seq_len=32, optimizer=OptimizerSpec(lr=2e-3, warmup_steps=20, clip_norm=1.0)),
}
Say = Callable[[str], None]


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = 1) -> dict[str, Any]:
    """Accuracy at full depth and seconds beside ``full``'s; ``only`` names cells and policies, ``repeats`` are seeds."""
    unknown = [name for name in only if name not in (*WORK, *POLICIES)]
    if unknown:
        raise UnknownName(f"no cell or policy {unknown[0]!r}; have: {choices((*WORK, *POLICIES))}")
    cells = [name for name in WORK if name in only] or list(WORK)
    policies = [name for name in POLICIES if name in only] or list(POLICIES)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name in cells:
            cell = CELLS[name](Path(folder))
            for policy in dict.fromkeys(["full", *policies]):
                runs = [_run(Path(folder), cell, name, policy, seed) for seed in range(repeats)]
                rows.append({"cell": name, "policy": policy, **_figures(runs)})
                say(f"{name}, {policy}: {rows[-1]['accuracy']}")
    for row in rows:
        whole = next(r for r in rows if (r["cell"], r["policy"]) == (row["cell"], "full"))
        row["to_full"] = round(row["cpu_s"] / whole["cpu_s"], 2)
    for line in table(rows):
        say(line)
    return {"benchmark": "policies", "steps": STEPS, "seeds": repeats, "rows": rows}


def _run(root: Path, cell: Cell, name: str, policy: str, seed: int) -> tuple[float, float]:
    artifact = open_artifact(cell.artifact)
    work = _work(WORK[name], policy, seed)
    train, test = (
        drawn(load_dataset(path, artifact.manifest, artifact.folder, seq_len=work.seq_len), count, seed)
        for path, count in ((cell.train, TRAIN_LINES), (cell.test, TEST_LINES))
    )
    with Machine(artifact, Resources(threads=1, hidden_cache_mb=2000), folder=root / "cache") as machine:
        start = artifact.adapter()
        head = class_mean_head(machine.class_sums(train, work, start), class_head(artifact.manifest))
        trainer = machine.trainer(train, work, {**start, **head})
        before_s = time.process_time()
        while not trainer.done:
            trainer.step()
        return machine.evaluate(test, trainer.adapter).accuracy, time.process_time() - before_s


def _work(work: LocalWork, policy: str, seed: int) -> LocalWork:
    fields = {name: getattr(work, name) for name in work.__struct_fields__}
    return LocalWork(**fields | {"policy": POLICIES[policy], "steps": STEPS, "batch_size": 16, "seed": seed})


def _figures(runs: Sequence[tuple[float, float]]) -> dict[str, float]:
    accuracies, seconds = zip(*runs, strict=True)
    return {
        "accuracy": round(statistics.mean(accuracies), 3),
        "spread": round(statistics.stdev(accuracies), 3) if len(runs) > 1 else 0.0,
        "cpu_s": round(statistics.mean(seconds), 1),
    }
