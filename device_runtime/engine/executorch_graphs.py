"""Opens and runs ``.pte`` graphs by ExecuTorch's runtime, with the interface of ``onnx_graphs``.

ExecuTorch's Python runtime speaks in torch tensors, so on a Linux device this backend, an optional extra, brings torch along;
its C++, Java and Swift runtimes need none. Both are loaded when the first graph of this backend is opened, never before.
"""

import ctypes
import warnings
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.errors import ArtifactError, ConfigError

Value = Any
"""A torch tensor."""
INSTALL = "pip install 'fleetune[executorch]' (it brings executorch==1.4.1)"
# The extension itself: ``executorch.runtime`` around it imports the whole exporter, seconds and 135 MB.
_BINDINGS = "executorch.extension.pybindings._portable_lib"
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_MMAP_THRESHOLD = 32 << 20


class ExecutorchGraph:
    """One opened graph file."""

    def __init__(self, path: Path) -> None:
        """Open ``path``.

        Raises:
            ArtifactError: ExecuTorch refuses the file.
            ConfigError: ExecuTorch is not installed; names the command.
        """
        self._name = path.name
        _load("torch")  # the extension links to it
        bindings = _load(_BINDINGS)
        _keep_memory()
        try:
            self._program = bindings._load_program(
                str(path), program_verification=bindings.Verification.InternalConsistency
            )
            self._method = self._program.load_method("forward")
        except RuntimeError as exc:
            raise ArtifactError(f"{path.name}: ExecuTorch cannot open it: {exc}") from exc

    def run(self, feeds: Mapping[str, Value], wanted: Sequence[str]) -> list[Value]:
        """Run the whole graph; ``feeds`` in the order in which the graph declares its inputs, ``wanted`` all its outputs.

        Raises:
            ArtifactError: a value larger than the graph's bounds, or of another type.
        """
        try:
            found = list(self._method.call(list(feeds.values())))
        except RuntimeError as exc:
            shapes = ", ".join(f"{n} {list(v.shape)}" for n, v in feeds.items())
            raise ArtifactError(
                f"{self._name}: ExecuTorch refuses {shapes[:400]}; see the manifest's bounds"
            ) from exc
        if len(found) != len(wanted):
            raise ArtifactError(f"{self._name}: expected {len(wanted)} outputs, got {len(found)}")
        return found


def value_of(array: Array) -> Value:
    """A tensor that shares the array's memory and keeps it alive."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # torch warns that the mapped weights are read-only; graphs never write inputs
        return _load("torch").from_numpy(np.asarray(array, order="C"))


def array_of(value: Value) -> Array:
    """The value's content, in the same memory."""
    return np.asarray(value.numpy())


def set_threads(threads: int) -> None:
    """Size XNNPACK's pool, 0 = as it comes (one per core).

    Raises:
        ConfigError: negative, or ExecuTorch is not installed.
    """
    if threads < 0:
        raise ConfigError(f"threads {threads}: expected 0 (one per core) or more")
    _load("torch")
    bindings = _load(_BINDINGS)
    if threads and bindings._threadpool_get_thread_count() != threads:
        bindings._unsafe_reset_threadpool(threads)


@cache
def _keep_memory() -> None:
    """Have glibc keep what a step frees, or every step faults in the same pages again (3 to 10 % of its time)."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


@cache
def _load(module: str) -> Any:
    """Import on demand: a device without this extra never pays for it, and torch stays out of everything else."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return import_module(module)
    except ImportError as exc:
        raise ConfigError(f"the executorch backend is not installed: {INSTALL}") from exc
