"""Batches, adapters and data for the tiny artifact, drawn from a seed; no torch."""

import numpy as np
from msgspec.structs import replace

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import Manifest, ProblemType
from fleetune.device_runtime.data.samples import Dataset, Dense, make_dataset


def draw_batch(manifest: Manifest, batch: int, seq: int, *, seed: int = 0) -> Arrays:
    """A batch of ``batch`` rows of ``seq`` tokens, the last third of every second row padded; labels 1 to 4."""
    rng = np.random.default_rng(seed)
    extents = {"batch": batch, "seq": seq}
    made = {row.name: rng.integers(1, 5, [extents[str(d)] for d in row.shape]) for row in manifest.inputs}
    made["attention_mask"][:] = 1
    made["attention_mask"][::2, seq - seq // 3 :] = 0
    return made


def noisy_adapter(artifact: Artifact, *, seed: int = 1) -> Arrays:
    """The artifact's adapter with noise, since the gradient of a fresh one is half zeros."""
    rng = np.random.default_rng(seed)
    return {
        n: a + rng.normal(size=a.shape, scale=0.1).astype(np.float32) for n, a in artifact.adapter().items()
    }


def draw_data(manifest: Manifest, num_rows: int, seq: int) -> Dataset:
    """The same as a data set."""
    columns = {name: Dense(values) for name, values in draw_batch(manifest, num_rows, seq).items()}
    return make_dataset(
        columns, np.full(num_rows, seq), seq_len=seq, num_classes=len(manifest.labels), label_name="labels"
    )


def as_problem(manifest: Manifest, problem_type: ProblemType, labels: tuple[str, ...]) -> Manifest:
    """The manifest as of a model of this problem type, with these outputs; its graphs are what they were."""
    shape: tuple[int | str, ...] = ("batch",) if len(labels) == 1 else ("batch", len(labels))
    inputs = tuple(
        replace(row, dtype="float32", shape=shape, pad=0) if row.role == "labels" else row
        for row in manifest.inputs
    )
    return replace(manifest, problem_type=problem_type, labels=labels, inputs=inputs)
