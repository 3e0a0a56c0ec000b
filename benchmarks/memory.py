"""Peak memory of training on a device: by the number of active layers, and beside the estimate of `footprint`.

MB are 10**6 bytes here, as `inspect` and `--memory-budget-mb` count them. `inspect` adds what the command line, a tokenizer
and texts take, which the worker here has not.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring.figures import chart_of, table
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of, model_of
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL
from fleetune.device_runtime.contracts.plans import LayerPlan, dropping
from fleetune.device_runtime.engine.footprint import footprint
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.tables import Table

BATCH, SEQ, STEPS, THREADS = 16, 64, 8, 2
Say = Callable[[str], None]


class Case(NamedTuple):
    """One measurement beside its estimate; ``mode`` as of workers/device_step.py."""

    source: str
    batch: int
    seq: int
    mode: str


SOURCES = Table(
    "model",
    {
        "minilm": ("minilm", "fp32"),
        "minilm-int8": ("minilm", "int8"),
        "bert": ("bert", "fp32"),
        "stories": ("stories", "fp32"),
    },
)
"""Subject and storage of the frozen weights."""
CASES = (
    Case("minilm", 16, 64, "full"),
    Case("minilm", 8, 128, "full"),
    Case("minilm", 16, 64, "half"),
    Case("minilm", 16, 64, "recompute"),
    Case("minilm", 1, 64, "full"),
    Case("minilm-int8", 16, 64, "full"),
    Case("minilm-int8", 8, 128, "recompute"),
    Case("bert", 8, 128, "full"),
    Case("bert", 8, 128, "half"),
    Case("bert", 8, 128, "recompute"),
    Case("stories", 8, 128, "full"),
    Case("stories", 16, 256, "recompute"),
)


def measure(say: Say, *, only: Sequence[str] = (), threads: int = THREADS) -> dict[str, Any]:
    """``rows`` by active layers of MiniLM, ``estimates`` of every case; ``only`` names models."""
    names = [name for name in only if SOURCES[name]] or list(SOURCES)
    rows: list[dict[str, Any]] = []
    estimates: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as root:
        for name in names:
            artifact = _artifact(name, Path(root), say)
            if artifact is None:
                continue
            rows += _by_active_layers(artifact, threads) if name == "minilm" else []
            estimates += _estimated(artifact, [c for c in CASES if c.source == name], threads)
    for line in (*table(rows), *table(estimates)):
        say(line)
    worst = max((row["estimate_over_measured"] for row in estimates), key=lambda r: abs(r - 1), default=None)
    return {
        "benchmark": "memory",
        "batch": [BATCH, SEQ],
        "threads": threads,
        "worst_estimate_over_measured": worst,
        "rows": rows,
        "estimates": estimates,
        "chart": chart_of("active_layers", rows, "peak_mb", "step_ms"),
    }


def _artifact(name: str, root: Path, say: Say) -> Artifact | None:
    """None where the model is not at hand."""
    subject, base_dtype = SOURCES[name]
    try:
        model_of(subject, root)
    except ConfigError as exc:
        say(f"{name} left out: {exc}")
        return None
    return open_artifact(artifact_of(subject, root, base_dtype=base_dtype, say=say), verify=False)


def _by_active_layers(artifact: Artifact, threads: int) -> Iterator[dict[str, Any]]:
    for active in range(artifact.manifest.num_layers, 0, -1):
        found = _run(artifact, Case("minilm", BATCH, SEQ, f"active:{active}"), threads)
        yield {"active_layers": active, **found}


def _estimated(artifact: Artifact, cases: list[Case], threads: int) -> Iterator[dict[str, Any]]:
    for case in cases:
        measured = _run(artifact, case, threads)["peak_mb"]
        found = footprint(
            artifact,
            _plan(case.mode, artifact.manifest.num_layers),
            batch_size=case.batch,
            seq_len=case.seq,
            memory=RECOMPUTE if case.mode.endswith("recompute") else SAVE_ALL,
        )
        expected = round(found.peak / 1e6, 1)
        yield {
            "case": f"{case.source} {case.batch} x {case.seq} {case.mode}",
            "estimate_mb": expected,
            "measured_mb": measured,
            "estimate_over_measured": round(expected / measured, 3),
        }


def _run(artifact: Artifact, case: Case, threads: int) -> dict[str, float]:
    words = (artifact.folder, case.batch, case.seq, STEPS, threads, case.mode)
    found = run_worker("device_step", *words, threads=threads)
    in_mb = {n: round(found[n] * 2**20 / 1e6, 1) for n in ("peak_mb", "mapped_weights_mb")}
    return {**in_mb, "step_ms": round(found["step_ms"], 1)}


def _plan(mode: str, num_layers: int) -> LayerPlan:
    return dropping(num_layers, range(1, num_layers, 2) if mode.startswith("half") else ())
