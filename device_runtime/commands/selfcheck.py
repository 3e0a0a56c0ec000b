"""``fleetune selfcheck``: replays what torch recorded at export and says how far each tensor is off."""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from safetensors import safe_open

from fleetune.device_runtime.arrays import Array, Arrays, load_arrays
from fleetune.device_runtime.contracts.artifact import GOLDEN, NOISE_STEP, Artifact, open_artifact
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL
from fleetune.device_runtime.contracts.plans import dropping
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.decoding import IDS, MASK
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.footprint import holds_whole_models
from fleetune.device_runtime.engine.processor import int8_path
from fleetune.device_runtime.errors import ArtifactError, one_line
from fleetune.device_runtime.prepared import prepared

log = logging.getLogger(__name__)

_Measure = Callable[[Array | np.generic, Array], float]
_STEPS = "steps."
_ENDS = f"{_STEPS}ends"
LIMIT = 1e-4
INT8_LIMIT = 5e-2
"""Of relative L2 error, against torch with the same int8 arithmetic, one layer at a time.

Two right implementations differ where a value lies on the border of two steps and rounds the other way: mostly 2e-6, and up to
3e-2 where that befalls the one token of two that answers, with VNNI and without. The scales of one matrix a tenth too large
give 0.062 to 0.22 (MiniLM), products that saturate 0.22 and more.
"""


class SelfcheckReport(msgspec.Struct, frozen=True, kw_only=True):
    """``tensors`` maps each checked tensor to its error.

    That is the largest difference over the largest value recorded; with an int8 base the norm of the difference over the norm.
    ``int8_path`` names the instructions with which this processor multiplies int8, whatever the base.
    """

    ok: bool
    max_relative_error: float
    limit: float
    int8_path: str
    tensors: dict[str, float]


def selfcheck(
    folder: str | Path,
    *,
    threads: int = 0,
    provider: str = "cpu",
    on_progress: Callable[[str], None] | None = None,
) -> SelfcheckReport:
    """Replay every recorded plan, with saved activations and with recomputed ones.

    Args:
        folder: made by ``fleetune export``.
        threads: for the kernels; 0 for one a core.
        provider: of onnxruntime, which runs them.
        on_progress: called with a line before each part of the work.

    Raises:
        UnknownName, ConfigError: no such provider, or none in this build.
        ArtifactError: the artifact does not open, or holds no golden step.
    """
    say = on_progress or log.info
    say(f"verifying the files of {folder}")
    artifact = open_artifact(folder)
    path = artifact.folder / GOLDEN
    recorded = load_arrays(path)
    plans = _plans(path)
    if not plans:
        raise ArtifactError(f"{path}: holds no recorded step; export again")
    is_int8 = artifact.manifest.base_dtype == "int8"
    measure, limit = (relative_distance, INT8_LIMIT) if is_int8 else (relative_error, LIMIT)
    batch, adapter = _part(recorded, "batch."), recorded_adapter(artifact, recorded)
    errors: dict[str, float] = {}
    num_layers = artifact.manifest.num_layers
    for memory in (SAVE_ALL,) if holds_whole_models(artifact.manifest) else (SAVE_ALL, RECOMPUTE):
        with open_engine(
            artifact, threads=threads, memory=memory, provider=provider, in_lanes=False
        ) as engine:
            said = ""
            for name, dropped in plans.items():
                if (line := _replaying(num_layers, dropped, recomputed=memory is RECOMPUTE)) != said:
                    say(said := line)
                result = engine.step(batch, dropping(num_layers, dropped), adapter, keep_logits=True)
                expected = _part(recorded, f"{name}.")
                found = {"loss": np.float32(result.loss), **_prefixed(result.grads)}
                if result.logits is not None and "logits" in expected:
                    found["logits"] = result.logits
                label = f"{name}.recompute." if memory is RECOMPUTE else f"{name}."
                errors |= {label + n: e for n, e in _errors(expected, found, measure).items()}
            if memory is SAVE_ALL and _ENDS in recorded:
                say("replaying the recorded batch part by part, as text is generated")
                errors |= _step_errors(engine, recorded, plans, adapter, measure)
    worst = max(errors.values())
    return SelfcheckReport(
        ok=bool(worst <= limit), max_relative_error=worst, limit=limit, int8_path=int8_path(), tensors=errors
    )


def _replaying(num_layers: int, dropped: Sequence[int], *, recomputed: bool) -> str:
    """What is being done; the same line for plans that differ in which layers they drop alone."""
    how = "recomputed" if recomputed else "kept"
    return f"replaying a step of {num_layers - len(dropped)} of {num_layers} layers, activations {how}"


def _step_errors(
    engine: Engine, recorded: Arrays, plans: Mapping[str, Sequence[int]], adapter: Arrays, measure: _Measure
) -> dict[str, float]:
    """Errors of the logits after each part of the recorded batch, read part by part as text is generated."""
    ids, mask = (np.asarray(recorded[f"batch.{name}"], np.int64) for name in (IDS, MASK))
    found = {}
    for name in [name for name in plans if f"{_STEPS}{name}" in recorded]:
        plan = dropping(engine.artifact.manifest.num_layers, plans[name])
        decoding, start = engine.decode(adapter, plan=plan), 0
        for part, end in enumerate(recorded[_ENDS].tolist()):
            logits = decoding.feed(ids[:, start:end], mask[:, :end])
            found[f"{name}.after {end} tokens"] = measure(logits, recorded[f"{_STEPS}{name}"][part])
            start = end
    return found


def recorded_adapter(artifact: Artifact, recorded: Arrays) -> Arrays:
    """The adapter of the golden step: the artifact's own with its noise, or as it stands in artifacts of before."""
    noise = {name: np.multiply(n, np.float32(NOISE_STEP)) for name, n in _part(recorded, "noise.").items()}
    own = artifact.adapter()
    return {n: np.add(own[n], units) for n, units in noise.items()} or _part(recorded, "adapter.")


def relative_error(found: Array | np.generic, expected: Array) -> float:
    """Largest absolute difference over the largest expected magnitude; infinite for another shape or a NaN."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    scale = np.abs(b).max(initial=0.0)
    return float(np.abs(a - b).max(initial=0.0) / scale) if scale else float(np.abs(a).max(initial=0.0))


def relative_distance(found: Array | np.generic, expected: Array) -> float:
    """L2 norm of the difference over that of what was expected; infinite for another shape or a NaN."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.linalg.norm(a - b) / (np.linalg.norm(b) or 1.0))


def _errors(
    expected: Arrays,
    found: dict[str, Array | np.generic],
    measure: _Measure,
) -> dict[str, float]:
    missing = {name: float("inf") for name in expected.keys() ^ found.keys()}
    return missing | {name: measure(found[name], expected[name]) for name in sorted(expected.keys() & found)}


def _plans(path: Path) -> dict[str, list[int]]:
    with safe_open(path, "np") as file:
        said = (file.metadata() or {}).get("plans", "{}")
    try:
        return msgspec.json.decode(said, type=prepared(dict[str, list[int]]))
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ArtifactError(f"{path}: its plans cannot be read: {one_line(exc)}; export again") from exc


def _part(arrays: Arrays, prefix: str) -> Arrays:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def _prefixed(grads: Arrays) -> dict[str, Array | np.generic]:
    return {f"grad.{name}": value for name, value in grads.items()}
