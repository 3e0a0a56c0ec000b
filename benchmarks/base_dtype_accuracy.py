"""What a storage of the frozen weights costs after training on it: the same seeds and batches on each, LoRA r=8.

Encoders begin with the class-mean head and are judged by accuracy, the language model by perplexity. ``before`` is without
training: of the encoders with that head alone. Differences to fp32 are taken seed by seed.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring.cells import Cell, bge_banking, drawn, minilm_banking, stories_shakespeare
from benchmarks.measuring.figures import table
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import class_head
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.training.evaluation import Evaluation
from fleetune.device_runtime.training.machine import Machine
from fleetune.exporters.storages import BASE_DTYPES

STEPS, TRAIN_LINES, TEST_LINES, SEEDS = 200, 2000, 600, 3
OF = "fp32"
_OPTIMIZER = OptimizerSpec(lr=2e-3, warmup_steps=20, clip_norm=1.0)
Say = Callable[[str], None]


class Subject(NamedTuple):
    """A model on a task, and what it is judged by."""

    cell: Callable[[Path, str], Cell]
    work: LocalWork
    score: Callable[[Evaluation], float]
    start: str = "none"


SUBJECTS = {
    "minilm-banking": Subject(
        minilm_banking,
        LocalWork(seq_len=32, optimizer=_OPTIMIZER),
        lambda found: found.accuracy,
        "class-mean",
    ),
    "bge-banking": Subject(
        bge_banking, LocalWork(seq_len=32, optimizer=_OPTIMIZER), lambda found: found.accuracy, "class-mean"
    ),
    "stories-plays": Subject(
        stories_shakespeare,
        LocalWork(seq_len=128, optimizer=_OPTIMIZER),
        lambda found: math.exp(found.loss),
    ),
}


def measure(say: Say, *, only: Sequence[str] = (), repeats: int = SEEDS) -> dict[str, Any]:
    """Score before and after by storage, and its difference to fp32's; ``only`` names subjects and storages."""
    known = (*SUBJECTS, *BASE_DTYPES)
    if unknown := [name for name in only if name not in known]:
        raise UnknownName(f"no subject or storage {unknown[0]!r}; have: {choices(known)}")
    chosen = [name for name in BASE_DTYPES if name in only and name != OF] or BASE_DTYPES[1:]
    rows = []
    for name in [name for name in SUBJECTS if name in only] or SUBJECTS:
        found: dict[str, list[tuple[float, float]]] = {}
        for storage in (OF, *chosen):
            with tempfile.TemporaryDirectory() as folder:
                cell = SUBJECTS[name].cell(Path(folder), storage)
                found[storage] = [_run(Path(folder), cell, SUBJECTS[name], seed) for seed in range(repeats)]
            rows.append({"subject": name, "storage": storage, **_figures(found[storage], found[OF])})
            say(f"{name}, {storage}: {rows[-1]}")
    for line in table(rows):
        say(line)
    return {"benchmark": "base_dtype_accuracy", "steps": STEPS, "seeds": repeats, "rows": rows}


def _run(root: Path, cell: Cell, subject: Subject, seed: int) -> tuple[float, float]:
    """The score before the first step and after the last."""
    artifact = open_artifact(cell.artifact)
    fields = {name: getattr(subject.work, name) for name in subject.work.__struct_fields__}
    work = LocalWork(**fields | {"steps": STEPS, "batch_size": 16, "seed": seed})
    train, test = (
        drawn(load_dataset(path, artifact.manifest, artifact.folder, seq_len=work.seq_len), count, seed)
        for path, count in ((cell.train, TRAIN_LINES), (cell.test, TEST_LINES))
    )
    with Machine(artifact, Resources(threads=1), folder=root / "cache") as machine:
        start = artifact.adapter()
        if subject.start == "class-mean":
            sums = machine.class_sums(train, work, start)
            start = {**start, **class_mean_head(sums, class_head(artifact.manifest))}
        before = subject.score(machine.evaluate(test, start))
        trainer = machine.trainer(train, work, start)
        while not trainer.done:
            trainer.step()
        return before, subject.score(machine.evaluate(test, trainer.adapter))


def _figures(
    runs: Sequence[tuple[float, float]], reference: Sequence[tuple[float, float]]
) -> dict[str, float]:
    before, after = (statistics.mean(scores) for scores in zip(*runs, strict=True))
    apart = [mine[1] - theirs[1] for mine, theirs in zip(runs, reference, strict=True)]
    return {
        "before": round(before, 4),
        "after": round(after, 4),
        "to_fp32": round(statistics.mean(apart), 4),
        "least": round(min(apart), 4),
        "most": round(max(apart), 4),
    }
