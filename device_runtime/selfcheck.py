"""``fleetune selfcheck``: replays what torch recorded at export and says how far each tensor is off."""

import json
from pathlib import Path

import msgspec
import numpy as np
from safetensors import safe_open

from device_runtime.arrays import Array, Arrays, load_arrays
from device_runtime.artifact import GOLDEN, open_artifact
from device_runtime.errors import ArtifactError
from device_runtime.plans import dropping
from device_runtime.stack import Stack

LIMIT = 1e-4


class SelfcheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """``tensors`` maps each checked tensor to its error: largest difference over the largest value recorded."""

    ok: bool
    max_relative_error: float
    limit: float
    tensors: dict[str, float]


def selfcheck(folder: str | Path, *, threads: int = 0) -> SelfcheckReport:
    """Replay every recorded plan, with saved activations and with recomputed ones.

    Raises:
        ArtifactError: the artifact does not open, or holds no golden step.
    """
    artifact = open_artifact(folder)
    path = artifact.folder / GOLDEN
    recorded = load_arrays(path)
    with safe_open(path, "np") as file:
        plans: dict[str, list[int]] = json.loads((file.metadata() or {}).get("plans", "{}"))
    if not plans:
        raise ArtifactError(f"{path}: holds no recorded step; export again")
    batch, adapter = _part(recorded, "batch."), _part(recorded, "adapter.")
    errors: dict[str, float] = {}
    for recompute in (False, True):
        with Stack(artifact, threads=threads, recompute=recompute) as stack:
            for name, dropped in plans.items():
                result = stack.step(batch, dropping(artifact.manifest.num_layers, dropped), adapter)
                found = {"loss": np.float32(result.loss), "logits": result.logits, **_prefixed(result.grads)}
                label = f"{name}.recompute." if recompute else f"{name}."
                errors |= {label + n: e for n, e in _errors(_part(recorded, f"{name}."), found).items()}
    worst = max(errors.values())
    return SelfcheckReport(ok=bool(worst <= LIMIT), max_relative_error=worst, limit=LIMIT, tensors=errors)


def relative_error(found: Array | np.generic, expected: Array) -> float:
    """Largest absolute difference over the largest expected magnitude; infinite for another shape or a NaN."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    scale = np.abs(b).max(initial=0.0)
    return float(np.abs(a - b).max(initial=0.0) / scale) if scale else float(np.abs(a).max(initial=0.0))


def _errors(expected: Arrays, found: dict[str, Array | np.generic]) -> dict[str, float]:
    missing = {name: float("inf") for name in expected.keys() ^ found.keys()}
    return missing | {
        name: relative_error(found[name], expected[name]) for name in sorted(expected.keys() & found)
    }


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _prefixed(grads: Arrays) -> dict[str, Array | np.generic]:
    return {f"grad.{name}": value for name, value in grads.items()}
