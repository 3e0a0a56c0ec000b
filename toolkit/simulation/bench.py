"""The worker's side: one opened artifact on one thread, and the data of the devices that were served last."""

import tempfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Generic, TypeVar

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.thresholds import stays
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.errors import FleetuneError
from fleetune.device_runtime.training.evaluation import evaluate
from fleetune.device_runtime.training.held_out import measured_rows, split
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.skip_effects import KeptEffects
from fleetune.toolkit.simulation.calls import WatchedEngine
from fleetune.toolkit.simulation.jobs import Done, Share, Task
from fleetune.toolkit.simulation.worker_folder import WorkerFolder

V = TypeVar("V")
_FILES, _DEVICES, _CACHES = 4, 64, 8
"""So many data files, devices' shares and hidden caches a worker keeps; those used last."""
_OF_THIS_MACHINE = ("held_seconds", "peak_mb")
"""Figures of a run that are the machine's, which no virtual device has."""


class Latest(Generic[V]):
    """Values by key, those used last; ``close`` is called with key and value of what is forgotten."""

    def __init__(self, limit: int, close: Callable[[Any, V], object] = lambda _, __: None) -> None:
        self._limit, self._close = limit, close
        self._values: OrderedDict[Any, V] = OrderedDict()

    def get(self, key: Any, make: Callable[[], V]) -> V:
        """The value of ``key``, made if it is not here."""
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self._limit:
            self._close(*self._values.popitem(last=False))
        return self._values[key]

    def clear(self) -> None:
        """Forget everything."""
        while self._values:
            self._close(*self._values.popitem())


class Datasets:
    """Data files, read once, and shares of them."""

    def __init__(self, artifact_dir: Path) -> None:
        self._artifact = open_artifact(artifact_dir)
        self._files: Latest[Dataset] = Latest(_FILES)
        self._shares: Latest[Dataset] = Latest(_DEVICES)

    def whole(self, path: str, seq_len: int, columns: Columns = Columns()) -> Dataset:
        """All samples of a file; errors as of :func:`load_dataset`."""
        manifest, folder = self._artifact.manifest, self._artifact.folder
        return self._files.get(
            (path, seq_len, columns),
            lambda: load_dataset(path, manifest, folder, seq_len=seq_len, columns=columns),
        )

    def of(self, share: Share, seq_len: int) -> Dataset:
        """The samples of a share."""
        whole, rows = self.whole(share.path, seq_len, share.columns), share.indices
        if rows is None:
            return whole
        return self._shares.get((share, seq_len), lambda: whole.subset(rows))


class Bench:
    """What does tasks; what comes of one does not depend on those before."""

    def __init__(self, artifact_dir: Path) -> None:
        """Open the artifact; ArtifactError if it is damaged."""
        self._artifact = open_artifact(artifact_dir)
        self._datasets = Datasets(artifact_dir)
        self._place = WorkerFolder()
        self._folder = self._place.path
        self._machines: dict[float, _Machine] = {}

    def close(self) -> None:
        """Let go of everything."""
        for machine in self._machines.values():
            machine.close()
        self._place.close()

    def do(self, task: Task) -> Done:
        """Do a task; what keeps it from being done is in what it returns."""
        machine = self._machine(task.hidden_cache_mb)
        machine.begin(task.files, task.memory)
        try:
            done = _KINDS[task.kind](self, machine, task)
        except FleetuneError as exc:
            done = Done(error=str(exc), error_kind=type(exc).__name__)
        except MemoryError as exc:
            done = Done(error=f"not enough memory for this work: {exc}", error_kind="ConfigError")
        return msgspec.structs.replace(done, calls=machine.watched.calls, files=machine.files())

    def _train(self, machine: "_Machine", task: Task) -> Done:
        start = parse_arrays(task.adapter)
        trainer = machine.trainer(self._data(task), task.work, start, secret=task.secret)
        while not trainer.done:
            trainer.step()
        return Done(
            adapter=to_bytes(_changed(trainer.adapter, start)),
            losses=[step.loss for step in trainer.history],
            active_layers=[step.active_layers for step in trainer.history],
            stats={name: value for name, value in trainer.stats.items() if name not in _OF_THIS_MACHINE},
            importance=[float(value) for value in trainer.importance],
            personal=sorted(trainer.personal) if task.work.personal or stays(task.work) else [],
        )

    def _evaluate(self, machine: "_Machine", task: Task) -> Done:
        found = machine.evaluate(self._data(task), parse_arrays(task.adapter))
        return Done(loss=found.loss, accuracy=found.accuracy, num_samples=found.num_samples)

    def _class_sums(self, machine: "_Machine", task: Task) -> Done:
        sums = machine.class_sums(self._data(task), task.work, parse_arrays(task.adapter))
        return Done(adapter=to_bytes(sums), num_samples=self._data(task).num_samples)

    def _held_out(self, machine: "_Machine", task: Task) -> Done:
        rows = measured_rows(split(self._data(task), task.work.held_out), task.work)
        if rows is None:
            return Done()
        size, adapter = task.work.batch_size, parse_arrays(task.adapter)
        found = evaluate(machine.engine, rows, adapter, batch_size=size, memory=machine.memory)
        return Done(loss=found.loss, accuracy=found.accuracy, num_samples=found.num_samples)

    def _data(self, task: Task) -> Dataset:
        return self._datasets.of(task.share, task.work.seq_len)

    def _machine(self, cache_mb: float) -> "_Machine":
        if cache_mb not in self._machines:
            folder = self._folder / f"machine-{len(self._machines)}"
            self._machines[cache_mb] = _Machine(self._artifact, cache_mb, folder)
        return self._machines[cache_mb]


class _Machine(Machine):
    """A machine of many devices: its engine notes what it is asked, and of the devices served last it keeps the caches."""

    def __init__(self, artifact: Artifact, cache_mb: float, folder: Path) -> None:
        super().__init__(artifact, Resources(threads=1, hidden_cache_mb=cache_mb), folder=folder)
        self.watched = WatchedEngine(self.engine)
        self.engine = self.watched
        self._effects = KeptEffects(self.watched, folder)
        self._place, self._limit_bytes = folder, int(1e6 * cache_mb)
        self._caches: Latest[HiddenCache] = Latest(_CACHES, self._forget)
        self._folders: dict[str, Path] = {}
        self._free: list[Path] = []

    def begin(self, files: Mapping[str, bytes], memory: MemoryPlan) -> None:
        """Be the machine of a device that has kept these files, and holds its steps so."""
        self.watched.calls, self.memory = [], memory
        self._place.mkdir(parents=True, exist_ok=True)
        for path in self._kept():
            path.unlink()
        for name, content in files.items():
            (self._place / name).write_bytes(content)

    def files(self) -> dict[str, bytes]:
        """What the device keeps now."""
        return {path.name: path.read_bytes() for path in self._kept()}

    def close(self) -> None:
        self._caches.clear()
        super().close()

    def _expected_mb(self, dataset: Dataset, work: LocalWork) -> float:
        """Not of this machine: what a device expects is worked out where its runs are."""
        return 0.0

    def _kept(self) -> list[Path]:
        return sorted(path for path in self._place.iterdir() if path.is_file())

    def _cache(self, dataset: Dataset) -> HiddenCache | None:
        if not self._limit_bytes:
            return None
        return self._caches.get(dataset.digest, lambda: self._new_cache(dataset, self._folder_for(dataset)))

    def _folder_for(self, dataset: Dataset) -> Path:
        folder = self._free.pop() if self._free else Path(tempfile.mkdtemp(dir=self._place.parent))
        self._folders[dataset.digest] = folder
        return folder

    def _forget(self, digest: str, cache: HiddenCache) -> None:
        """Empty a cache; its folder is the next one's."""
        cache.close()
        self._free.append(self._folders.pop(digest))


def _changed(values: Arrays, start: Arrays) -> Arrays:
    return {name: value for name, value in values.items() if not np.array_equal(value, start[name])}


_KINDS: dict[str, Callable[[Bench, _Machine, Task], Done]] = {
    "train": Bench._train,
    "evaluate": Bench._evaluate,
    "class-means": Bench._class_sums,
    "held-out": Bench._held_out,
}
