"""An artifact against plain transformers + peft: one batch of very unequal rows, every way of running it, each row alone too."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import peft
import torch
import transformers
from anywhere import open_anywhere
from torch import Tensor

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.commands.selfcheck import relative_error
from fleetune.device_runtime.contracts.adapters import save_peft
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import Input
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.engine.footprint import holds_whole_models
from fleetune.toolkit.tasks import IGNORED, TASKS

LENGTHS = np.array([21, 1, 13, 2, 6])
UNLABELLED = 2
"""The row of which no token has a label, where tokens have them."""
WAYS = ((1, SAVE_ALL), (2, SAVE_ALL), (1, MemoryPlan(micro_batch=1)), (2, MemoryPlan(micro_batch=2)))
"""Threads, and how rows are held: all together, on lanes of three and two, alone, and on lanes of one."""


def errors_against_peft(artifact: Artifact, adapter: Arrays, model: Path) -> dict[str, float]:
    """Largest relative error of loss, gradients and predictions by way of running, of the adapter on the model of a folder."""
    reference = _load(artifact, adapter, model)
    batch = unequal_rows(artifact, int(getattr(reference.config, "vocab_size", 0)))
    loss, grads = _step(reference, batch)
    alone = [_logits(reference, _row(artifact, batch, i)) for i in range(len(LENGTHS))]
    features = {row.name: batch[row.name] for row in artifact.manifest.features}
    found = {}
    for threads, memory in ways_of(artifact):
        with open_anywhere(artifact, threads=threads, memory=memory) as engine:
            rows = engine.rows(len(LENGTHS))
            step = engine.step(batch, full(artifact.manifest.num_layers), adapter, rows=rows)
            logits = engine.predict(features, adapter, rows=rows)
            errors = [relative_error(np.float32(step.loss), loss), _worst(step.grads, grads)]
            errors += [_row_error(*pair) for pair in zip(logits, alone, strict=True)]
            errors.append(relative_error(np.float32(engine.evaluate(batch, adapter, rows=rows)[0]), loss))
            if artifact.manifest.head.targets is not None:
                last = engine.predict_at(features, adapter, LENGTHS - 1, rows=rows)
                errors += [relative_error(one, row[-1]) for one, row in zip(last, alone, strict=True)]
        found[f"{threads} threads, {memory.micro_batch} rows at a time"] = max(errors)
    return found


def ways_of(artifact: Artifact) -> list[tuple[int, MemoryPlan]]:
    """Those of WAYS that the backend has: whole models run all rows together."""
    whole = holds_whole_models(artifact.manifest)
    return [way for way in WAYS if not whole or way[1] == SAVE_ALL]


def unequal_rows(artifact: Artifact, vocabulary: int) -> Arrays:
    """A batch of rows of LENGTHS, padded on the right as devices pad."""
    rng = np.random.default_rng(7)
    manifest = artifact.manifest
    inside = np.arange(LENGTHS.max()) < LENGTHS[:, None]
    batch = {row.name: _draw(row, rng, vocabulary) for row in manifest.inputs}
    for row in manifest.inputs:
        if row.shape == ("batch", "seq"):
            batch[row.name][~inside] = row.pad
    labels = batch[manifest.label_name]
    labels %= len(manifest.labels) or vocabulary
    if labels.ndim == 2:
        labels[~inside] = labels[UNLABELLED] = IGNORED
    return batch


def _draw(row: Input, rng: np.random.Generator, vocabulary: int) -> Any:
    extents = {"batch": len(LENGTHS), "seq": int(LENGTHS.max())}
    shape = [extents[n] if isinstance(n, str) else n for n in row.shape]
    if row.dtype == "float32":
        return rng.standard_normal(shape).astype(np.float32)
    if row.name == "attention_mask":
        return np.ones(shape, np.int64)
    return rng.integers(5, max(6, vocabulary), shape)  # no special token


def _load(artifact: Artifact, adapter: Arrays, model: Path) -> Any:
    """The model as its own library loads it, and the adapter as peft does."""
    classes = {"num_labels": len(artifact.manifest.labels)} if artifact.manifest.labels else {}
    auto = getattr(transformers, TASKS[artifact.manifest.task].auto_class)
    with tempfile.TemporaryDirectory() as folder:
        save_peft(Path(folder), artifact.manifest, adapter)
        plain = auto.from_pretrained(model, attn_implementation="eager", dtype=torch.float32, **classes)
        return peft.PeftModel.from_pretrained(plain, folder, is_trainable=True).eval()


def _row(artifact: Artifact, batch: Arrays, i: int) -> Arrays:
    """Row ``i`` by itself, without padding and labels."""
    rows = {row.name: (row, batch[row.name][i : i + 1]) for row in artifact.manifest.features}
    return {n: a[:, : LENGTHS[i]] if row.shape == ("batch", "seq") else a for n, (row, a) in rows.items()}


def _tensors(batch: Arrays) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in batch.items()}


def _logits(model: Any, batch: Arrays) -> Arrays:
    with torch.no_grad():
        return model(**_tensors(batch)).logits[0].numpy()  # (C,) or (S, C)


def _step(model: Any, batch: Arrays) -> tuple[Arrays, Arrays]:
    """Loss and gradients of the whole batch, by the model's own loss."""
    loss = model(**_tensors(batch)).loss
    loss.backward()
    grads = {n: p.grad.numpy() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach().numpy(), {
        n.replace(".modules_to_save.default", "").replace(".default", ""): grad for n, grad in grads.items()
    }


def _worst(found: Arrays, expected: Arrays) -> float:
    if found.keys() != expected.keys():
        return float("inf")
    return max(relative_error(found[name], grad) for name, grad in expected.items())


def _row_error(padded: Any, alone: Any) -> float:
    """Of one row's logits: those of padding are nobody's business."""
    return relative_error(padded[: len(alone)] if alone.ndim > 1 else padded, alone)
