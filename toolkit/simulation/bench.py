"""The worker's side: one opened artifact on one thread, and the data of the devices that were served last."""

import shutil
import tempfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from fleetune.device_runtime.arrays import Arrays, parse_arrays, to_bytes
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.errors import FleetuneError
from fleetune.device_runtime.training.machine import Machine
from fleetune.toolkit.simulation.jobs import Done, Share, Task

V = TypeVar("V")
_FILES, _DEVICES, _CACHES = 4, 64, 8
"""So many data files, devices' shares and hidden caches a worker keeps; those used last."""


class Latest(Generic[V]):
    """Values by key, the latest used ones; ``close`` is called with what is forgotten."""

    def __init__(self, limit: int, close: Callable[[V], object] = lambda _: None) -> None:
        self._limit, self._close = limit, close
        self._values: OrderedDict[Any, V] = OrderedDict()

    def get(self, key: Any, make: Callable[[], V]) -> V:
        """The value of ``key``, made if it is not here."""
        if key not in self._values:
            self._values[key] = make()
        self._values.move_to_end(key)
        while len(self._values) > self._limit:
            self._close(self._values.popitem(last=False)[1])
        return self._values[key]

    def clear(self) -> None:
        """Forget everything."""
        while self._values:
            self._close(self._values.popitem()[1])


class Datasets:
    """Data files, read once, and shares of them."""

    def __init__(self, artifact_dir: Path) -> None:
        self._artifact = open_artifact(artifact_dir)
        self._files: Latest[Dataset] = Latest(_FILES)
        self._shares: Latest[Dataset] = Latest(_DEVICES)

    def whole(self, path: str, seq_len: int) -> Dataset:
        """All samples of a file; errors as of :func:`load_dataset`."""
        manifest, folder = self._artifact.manifest, self._artifact.folder
        return self._files.get((path, seq_len), lambda: load_dataset(path, manifest, folder, seq_len=seq_len))

    def of(self, share: Share, seq_len: int) -> Dataset:
        """The samples of a share."""
        whole, rows = self.whole(share.path, seq_len), share.indices
        if rows is None:
            return whole
        return self._shares.get((share, seq_len), lambda: whole.subset(rows))


class Bench:
    """What does tasks; what comes of one does not depend on those before."""

    def __init__(self, artifact_dir: Path) -> None:
        """Open the artifact; ArtifactError if it is damaged."""
        self._artifact = open_artifact(artifact_dir)
        self._datasets = Datasets(artifact_dir)
        self._folder = Path(tempfile.mkdtemp(prefix="fleetune-worker-"))
        self._machines: dict[float, Machine] = {}

    def close(self) -> None:
        """Let go of everything."""
        for machine in self._machines.values():
            machine.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def do(self, task: Task) -> Done:
        """Do a task; what keeps it from being done is in what it returns."""
        try:
            return _KINDS[task.kind](self, task)
        except FleetuneError as exc:
            return Done(error=str(exc), error_kind=type(exc).__name__)
        except MemoryError as exc:
            return Done(error=f"not enough memory for this work: {exc}", error_kind="ConfigError")

    def _train(self, task: Task) -> Done:
        start = parse_arrays(task.adapter)
        trainer = self._machine(task).trainer(self._data(task), task.work, start)
        while not trainer.done:
            trainer.step()
        return Done(
            adapter=to_bytes(_changed(trainer.adapter, start)),
            losses=[step.loss for step in trainer.history],
            active_layers=[step.active_layers for step in trainer.history],
            stats=dict(getattr(trainer, "stats", {})),
            importance=[float(value) for value in getattr(trainer, "importance", ())],
        )

    def _evaluate(self, task: Task) -> Done:
        found = self._machine(task).evaluate(self._data(task), parse_arrays(task.adapter))
        return Done(loss=found.loss, accuracy=found.accuracy, num_samples=found.num_samples)

    def _data(self, task: Task) -> Dataset:
        return self._datasets.of(task.share, task.work.seq_len)

    def _machine(self, task: Task) -> Machine:
        cache_mb = task.hidden_cache_mb if task.kind == "train" else 0.0
        if cache_mb not in self._machines:
            resources = Resources(threads=1, hidden_cache_mb=cache_mb)
            folder = self._folder / f"cache-{len(self._machines)}"
            self._machines[cache_mb] = Machine(self._artifact, resources, folder=folder)
        return self._machines[cache_mb]


def _changed(values: Arrays, start: Arrays) -> Arrays:
    return {name: value for name, value in values.items() if not np.array_equal(value, start[name])}


_KINDS: dict[str, Callable[[Bench, Task], Done]] = {"train": Bench._train, "evaluate": Bench._evaluate}
