"""A local run on disk: one safetensors file, written whole or not at all, that a trainer continues from bit for bit."""

import re
from collections.abc import Collection, Mapping
from hashlib import sha256
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from fleetune.device_runtime.arrays import PRIVATE, Array, Arrays, load_arrays, save_arrays, to_bytes
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ArtifactError, ConfigError, StateError, one_line
from fleetune.device_runtime.options import values_of
from fleetune.device_runtime.prepared import prepared

FORMAT = 2
"""2: plans and batches are drawn by counter (``draws``), the optimizer's state is a chain's."""
_HEADER = "fleetune.checkpoint"
_SEAL = re.compile(r',"sha256":"([0-9a-f]{64})"\}$')
"""The end of a header: SHA-256 of what stands before it, and of the arrays. Releases that knew none wrote none."""
_PARTS = ("adapter", "optimizer", "history", "importance", "influence")


class Origin(msgspec.Struct, frozen=True):
    """What a run is a function of: a checkpoint is good for no other."""

    artifact: str
    """SHA-256 of the artifact's manifest."""
    data: str
    """Digest of the data set."""
    adapter: str
    """SHA-256 of the adapter the run started from."""
    work: LocalWork
    head_start: str = "none"
    """What took the place of the starting adapter's head before the first step."""
    class_weights: str = ""
    """As :func:`fleetune.device_runtime.training.class_weights.read_class_weights` is given them."""

    @property
    def of_any_length(self) -> "Origin":
        """The same for runs that differ in their length alone."""
        return msgspec.structs.replace(self, work=msgspec.structs.replace(self.work, steps=0, epochs=0))


class Checkpoint(NamedTuple):
    """A run after ``step`` steps; ``history`` holds one entry a step for each of its names."""

    origin: Origin
    step: int
    policy_state: dict[str, Any]
    adapter: Arrays
    optimizer: Arrays
    history: dict[str, NDArray[np.float64]]
    importance: Arrays
    """Sums over the steps, by layer; empty in checkpoints of releases that kept none."""
    figures: Mapping[str, float] = MappingProxyType({})
    """What else it came to."""
    influence: Mapping[str, Array] = MappingProxyType({})
    """Sums over the steps, by layer and sample; empty as those of ``importance``."""


class _Header(msgspec.Struct, frozen=True):
    format: int
    origin: Origin
    step: Annotated[int, msgspec.Meta(ge=0)]
    policy_state: dict[str, Any]
    figures: dict[str, float] = {}


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically, for its owner alone: it tells of the data.

    Raises:
        StateError: the disk is full, say; what was there before stays whole.
    """
    header = _Header(
        FORMAT, checkpoint.origin, checkpoint.step, checkpoint.policy_state, dict(checkpoint.figures)
    )
    arrays = {f"{part}.{name}": array for part in _PARTS for name, array in getattr(checkpoint, part).items()}
    said = msgspec.json.encode(header).decode()
    try:
        save_arrays(path, arrays, metadata={_HEADER: _sealed(said, arrays)}, mode=PRIVATE)
    except OSError as exc:
        raise StateError(f"{path}: cannot be written: {exc.strerror or exc}; the one before stays") from exc


def load_checkpoint(path: Path, origin: Origin, *, but_for: Collection[str] = ()) -> Checkpoint:
    """Read the checkpoint of the run that ``origin`` describes; fields of its work in ``but_for`` may differ.

    Raises:
        StateError: the file cannot be read, is damaged, or is no checkpoint of this version.
        ConfigError: the checkpoint is of another run (every difference listed).
    """
    said = _read_said(path)
    header = _parse_header(path, said)
    if differences := _differences(header.origin, origin, but_for):
        raise ConfigError(
            f"{path}: a checkpoint of another run ({'; '.join(differences)}); "
            "use another output folder, or resume=False (--no-resume) to start anew"
        )
    arrays = _read_arrays(path)
    if not _is_whole(said, arrays):
        raise damaged(path, "its checksum differs")
    adapter, optimizer, history, importance, influence = (_part(arrays, part) for part in _PARTS)
    floats = {name: array.astype(np.float64) for name, array in history.items()}
    return Checkpoint(
        origin,
        header.step,
        header.policy_state,
        adapter,
        optimizer,
        floats,
        importance,
        header.figures,
        influence,
    )


def damaged(path: Path, problem: str) -> StateError:
    """Say that a checkpoint cannot be continued from, and what to do."""
    return StateError(f"{path}: a damaged checkpoint: {problem}; delete it to start anew")


def layout_problems(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """How arrays differ from those expected, in name, dtype or shape."""
    problems = [f"{name}: missing" for name in sorted(wanted.keys() - found.keys())]
    problems += [f"{name}: unknown" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(found.keys() & wanted.keys()):
        have, want = found[name], wanted[name]
        if have.dtype != want.dtype or have.shape != want.shape:
            shapes = f"{want.dtype}{list(want.shape)}, got {have.dtype}{list(have.shape)}"
            problems.append(f"{name}: expected {shapes}")
    return problems


def _sealed(said: str, arrays: Arrays) -> str:
    """A header with its seal as the last field."""
    return f'{said[:-1]},"sha256":"{_digest(said, arrays)}"}}'


def _is_whole(said: str, arrays: Arrays) -> bool:
    found = _SEAL.search(said)
    return found is None or found[1] == _digest(said[: found.start()] + "}", arrays)


def _digest(said: str, arrays: Arrays) -> str:
    return sha256(said.encode() + to_bytes(arrays)).hexdigest()


def _read_arrays(path: Path) -> Arrays:
    try:
        return load_arrays(path)
    except ArtifactError as exc:
        raise damaged(path, str(exc)) from exc


def _read_said(path: Path) -> str:
    try:
        with safe_open(path, framework="np") as file:
            return str((file.metadata() or {}).get(_HEADER, ""))
    except (OSError, SafetensorError) as exc:
        raise StateError(f"{path}: not a checkpoint: {one_line(exc)}; delete it to start anew") from exc


def _parse_header(path: Path, said: str) -> _Header:
    try:
        header = msgspec.json.decode(said, type=prepared(_Header))
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise StateError(f"{path}: not a checkpoint: {one_line(exc)}; delete it to start anew") from exc
    if header.format != FORMAT:
        raise StateError(
            f"{path}: checkpoint format {header.format}, this version reads {FORMAT}; delete it to start anew"
        )
    return header


def _differences(found: Origin, wanted: Origin, but_for: Collection[str]) -> list[str]:
    named = [
        (what, a, b)
        for what, a, b in (
            ("artifact", found.artifact[:12], wanted.artifact[:12]),
            ("data", found.data[:12], wanted.data[:12]),
            ("starting adapter", found.adapter[:12], wanted.adapter[:12]),
            ("head_start", found.head_start, wanted.head_start),
            ("class_weights", found.class_weights, wanted.class_weights),
        )
    ]
    theirs, ours = values_of(found.work), values_of(wanted.work)
    named += [(name, theirs[name], ours[name]) for name in ours if name not in but_for]
    return [f"{what}: {a} there, {b} here" for what, a, b in named if a != b]


def _part(arrays: Arrays, part: str) -> Arrays:
    return {
        name.removeprefix(f"{part}."): array for name, array in arrays.items() if name.startswith(f"{part}.")
    }
