"""Measures a run on held-out samples while it trains, stops it when it no longer improves, and keeps the best adapter it had."""

from collections.abc import Callable
from hashlib import sha256
from math import inf, isfinite
from pathlib import Path
from typing import NamedTuple

import msgspec
from safetensors import SafetensorError, safe_open

from fleetune.device_runtime.arrays import PRIVATE, Arrays, load_arrays, save_arrays
from fleetune.device_runtime.contracts.artifact import check_adapter
from fleetune.device_runtime.contracts.evaluation_file import Evaluated
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.thresholds import parameters_of
from fleetune.device_runtime.errors import ArtifactError, StateError
from fleetune.device_runtime.files import doing
from fleetune.device_runtime.prepared import prepared
from fleetune.device_runtime.training.checkpoint import Origin
from fleetune.device_runtime.training.trainer import Trainer

_HEADER = "fleetune.evaluations"


class Row(NamedTuple):
    """One evaluation, after ``step`` steps."""

    step: int
    loss: float
    accuracy: float | None
    """None where a row's label is not one class."""

    @property
    def rank(self) -> float:
        """Its loss; a loss that is not finite comes last."""
        return self.loss if isfinite(self.loss) else inf


class _Record(msgspec.Struct, frozen=True):
    key: str
    rows: list[tuple[int, float | None, float | None]]


class Watch:
    """The evaluations of one run. A checkpoint is written, then what was measured, and then it counts: a kill changes nothing."""

    def __init__(
        self,
        path: Path,
        trainer: Trainer,
        *,
        key: str,
        every: int,
        patience: int,
        measure: Callable[[Arrays], Evaluated],
        keep: Callable[[], object],
        tell: Callable[[str], object],
    ) -> None:
        """Go on from the file, if it is of this run and the run is past its beginning.

        Args:
            path: the file.
            trainer: the run, restored or new.
            key: of the run and what it is measured on, as :func:`key_of` makes it.
            every: steps between evaluations.
            patience: evaluations without a lower loss; 0 for any number.
            measure: measures an adapter; a loss of None is one that is not finite.
            keep: writes the run's checkpoint.
            tell: told of each evaluation.

        Raises:
            StateError: the file is damaged, or further on than the run.
        """
        self._path, self._trainer, self._key = path, trainer, key
        self._every, self._patience = every, patience
        self._measure, self._keep, self._tell = measure, keep, tell
        self._rows: dict[int, Row] = {}
        if trainer.step_index and path.exists():
            self._rows = {row.step: row for row in _load(path, key)}
        if max(self._rows, default=0) > trainer.step_index:
            raise StateError(
                f"{path}: of step {max(self._rows)}, the checkpoint of step {trainer.step_index}; --no-resume starts anew"
            )

    @property
    def rows(self) -> list[Row]:
        """The evaluations so far, in their order."""
        return [self._rows[step] for step in sorted(self._rows)]

    @property
    def has_patience(self) -> bool:
        """Whether the adapter of the lowest loss is wanted."""
        return self._patience > 0

    @property
    def best(self) -> Row | None:
        """The first of those with the lowest loss."""
        return min(self.rows, key=lambda row: (row.rank, row.step), default=None)

    @property
    def is_over(self) -> bool:
        """Whether patience is at its end."""
        best = self.best
        since = [row for row in self.rows if best and row.step > best.step]
        return 0 < self._patience <= len(since)

    def look(self) -> bool:
        """Measure if an evaluation is due where the run stands; returns :attr:`is_over`."""
        step = self._trainer.step_index
        is_due = step > 0 and (step % self._every == 0 or self._trainer.done)
        if is_due and step not in self._rows and not self.is_over:
            self._add(step)
        return self.is_over

    def best_adapter(self, manifest: Manifest) -> Arrays:
        """The adapter of :attr:`best`; StateError if it is not there."""
        if self.best and self.best.step == self._trainer.step_index:
            return self._trainer.adapter
        try:
            found = load_arrays(self._path)
            check_adapter(manifest, parameters_of(found))
        except (ArtifactError, OSError) as exc:
            raise _damaged(self._path) from exc
        return found

    def _add(self, step: int) -> None:
        found = self._measure(self._trainer.adapter)
        row = Row(step, inf if found.loss is None else found.loss, found.accuracy)
        before = min((other.rank for other in self.rows), default=inf)
        is_best = not self.rows or row.rank < before
        adapter = self._trainer.adapter if is_best else load_arrays(self._path)
        self._rows[step] = row
        self._keep()
        self._save(adapter)
        self._tell(f"step {step}: {'the best so far' if is_best else f'no lower loss than {before:.4f}'}")

    def _save(self, adapter: Arrays) -> None:
        said = msgspec.json.encode(
            _Record(self._key, [(row.step, row.loss, row.accuracy) for row in self.rows])
        )
        with doing("written", self._path):
            save_arrays(self._path, adapter, metadata={_HEADER: said.decode()}, mode=PRIVATE)


def key_of(origin: Origin, held: str) -> str:
    """What evaluations are of: a run of any length, and the digest of the samples it is measured on."""
    told = msgspec.to_builtins(origin.of_any_length)
    for part in (told, told["work"]):
        if not part["class_weights"]:  # which the files of earlier releases do not know
            del part["class_weights"]
    return sha256(msgspec.json.encode([told, held])).hexdigest()


def _load(path: Path, key: str) -> list[Row]:
    """Rows of the file; none if it is of another run."""
    try:
        with safe_open(path, framework="numpy") as file:
            found = msgspec.json.decode((file.metadata() or {})[_HEADER], type=prepared(_Record))
    except (SafetensorError, OSError, KeyError, msgspec.MsgspecError, UnicodeError, RecursionError) as exc:
        raise _damaged(path) from exc
    if found.key != key:
        return []
    return [Row(step, inf if loss is None else loss, accuracy) for step, loss, accuracy in found.rows]


def _damaged(path: Path) -> StateError:
    return StateError(f"{path}: damaged, or not there; --no-resume starts anew")
