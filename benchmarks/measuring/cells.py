"""What the paper's comparison runs on: real pretrained models and real data, as artifacts and files, made once below a folder.

Set FLEETUNE_SHARED to the folder with ``models/`` and ``data/`` if it is not ``../shared``.
"""

import gzip
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.measuring.subjects import artifact_of
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.draws import Key, permutation
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.tables import Table
from fleetune.toolkit.export import export
from fleetune.toolkit.models import packaged_model

SHARED = Path(os.environ.get("FLEETUNE_SHARED", "../shared"))
BASE_DTYPE = "int8"
"""Of the text encoders' frozen matrices: less time and memory for every arm alike."""

DEVICES_A_SPEAKER = 4
"""There are six speakers."""


class Cell(NamedTuple):
    """A model on a task."""

    artifact: Path
    train: Path
    test: Path
    owners: Path | None = None
    """File that says whose each training example is."""


def bge_mnli(root: Path) -> Cell:
    """BGE-small, 12 layers, on pairs of sentences."""
    return _texts(_bge(root), root / "bge-mnli", "mnli_small", num_labels=3)


def minilm_mnli(root: Path) -> Cell:
    """MiniLM, 6 layers, on pairs of sentences."""
    return _texts(packaged_model(), root / "minilm-mnli", "mnli_small", num_labels=3)


def bge_banking(root: Path, base_dtype: str = BASE_DTYPE) -> Cell:
    """BGE-small on banking77."""
    return _texts(_bge(root), root / "bge-banking", "banking77", num_labels=77, base_dtype=base_dtype)


def minilm_banking(root: Path, base_dtype: str = BASE_DTYPE) -> Cell:
    """MiniLM, 6 layers, on banking77."""
    return _texts(
        packaged_model(), root / "minilm-banking", "banking77", num_labels=77, base_dtype=base_dtype
    )


def stories_shakespeare(root: Path, base_dtype: str = BASE_DTYPE) -> Cell:
    """stories260K on plays: the first nine tenths train, the last tenth judges."""
    artifact = artifact_of("stories", root, say=lambda line: None, base_dtype=base_dtype)
    text = gzip.decompress(_there("data/tinyshakespeare/input.txt.gz").read_bytes()).decode()
    paths, cut = [root / f"plays-{part}.txt" for part in ("train", "test")], 9 * len(text) // 10
    for path, part in zip(paths, (text[:cut], text[cut:]), strict=True):
        path.write_text(part, encoding="utf-8")
    return Cell(artifact, *paths)


def kwt_digits(root: Path) -> Cell:
    """KWT-1, 12 narrow layers, on spoken digits, by speaker."""
    from benchmarks.measuring.keywords import export_keywords, features_of

    artifact = root / "kwt-digits"
    with np.load(_there("models/kwt1/kwt1_weights.npz")) as file:
        weights = dict(file)
    if not (artifact / "manifest.json").exists():
        export_keywords(weights, artifact)
    with np.load(_there("data/fsdd/logmel_6bit.npz")) as file:
        data: dict[str, Any] = dict(file)
    low, high = float(data["lo"]), float(data["hi"])
    bands = (low + data["x"].astype(np.float32) / 63 * (high - low)).astype(np.float32)
    columns = {"mfcc": features_of(bands, weights), "labels": data["y"].astype(np.int64)}
    paths = {name: root / f"digits-{name}.npz" for name in ("train", "test")}
    for name, rows in (("train", ~data["is_test"]), ("test", data["is_test"])):
        np.savez(paths[name], **{column: values[rows] for column, values in columns.items()})
    owners = root / "digits-owners.csv"
    speakers = data["speaker"][~data["is_test"]].tolist()
    named = [f"{speaker}-{i % DEVICES_A_SPEAKER}" for i, speaker in enumerate(speakers)]
    owners.write_text("owner\n" + "".join(f"{name}\n" for name in named), encoding="utf-8")
    return Cell(artifact, paths["train"], paths["test"], owners)


CELLS: Table[Callable[[Path], Cell]] = Table(
    "cell",
    {
        "bge-mnli": bge_mnli,
        "minilm-mnli": minilm_mnli,
        "bge-banking": bge_banking,
        "minilm-banking": minilm_banking,
        "minilm-skewed": minilm_banking,
        "kwt-digits": kwt_digits,
    },
)


def drawn(dataset: Dataset, count: int, seed: int) -> Dataset:
    """Some samples of a dataset, others with another seed."""
    return dataset.subset(permutation(Key(seed, "held-out", 0), dataset.num_samples)[:count])


def _texts(model: Path, artifact: Path, data: str, *, num_labels: int, base_dtype: str = BASE_DTYPE) -> Cell:
    if not (artifact / "manifest.json").exists():
        export(
            model,
            task="sequence-classification",
            num_labels=num_labels,
            out=artifact,
            base_dtype=base_dtype,
        )
    folder = _there(f"data/{data}")
    return Cell(artifact, folder / "train.jsonl.gz", folder / "test.jsonl.gz")


def _bge(root: Path) -> Path:
    folder = root / "bge-small"
    if not (folder / "config.json").exists():
        make = _there("models/bge_small_en/make_folder.py")
        done = subprocess.run([sys.executable, make, folder], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"{make}: {done.stderr.strip().splitlines()[-1]}")
    return folder


def _there(name: str) -> Path:
    path = (SHARED / name).resolve()
    if not path.exists():
        raise ConfigError(f"{path}: not there; set FLEETUNE_SHARED to the folder with models/ and data/")
    return path
