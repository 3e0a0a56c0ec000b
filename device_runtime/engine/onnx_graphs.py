"""The only file that knows onnxruntime: opens graphs, runs them, and keeps their values out of Python.

A value is opaque (``Value``); :func:`value_of` wraps an array without copying it, so a slice of a memory-mapped file stays
file-backed, clean, evictable memory, and :func:`array_of` gives it back.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.errors import (
    ArtifactError,
    ConfigError,
    DataError,
    FleetuneError,
    choices,
    one_line,
)
from fleetune.device_runtime.tables import Table

Value = Any
"""An onnxruntime OrtValue."""

_QUIET = 4
"""Fatal only: an error of a run is raised, and told as ours."""
_NO_ROW = "out of data bounds"
"""In what onnxruntime says of an id that a table has no row for."""
_NO_MEMORY = ("Failed to allocate memory", "bad_alloc")
_REASON_MAX = 300


class Provider(NamedTuple):
    """Who runs a graph's operators, first choice first, and in whose memory values lie."""

    names: tuple[str, ...]
    device: str = "cpu"


_CPU, _CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
PROVIDERS = Table(
    "provider",
    {
        "cpu": Provider((_CPU,)),
        "cuda": Provider((_CUDA, _CPU), "cuda"),
        "tensorrt": Provider(("TensorrtExecutionProvider", _CUDA, _CPU), "cuda"),
        "xnnpack": Provider(("XnnpackExecutionProvider", _CPU)),
    },
)


class OnnxGraph:
    """One opened graph file."""

    def __init__(
        self,
        path: Path,
        threads: int,
        *,
        provider: Provider = PROVIDERS["cpu"],
        grows: bool = False,
        run: Any = None,
    ) -> None:
        """Open ``path``.

        Args:
            path: the file.
            threads: that share the work of each operator; with 1, the one that calls, of which there may be several.
            provider: who runs the operators.
            grows: its values are a little larger in every run: they get memory of the system's own, not of the arena, which
                would keep a piece of each size for ever (100 MB after 500 tokens of a model of 260,032 parameters).
            run: options of every run, as of :func:`run_options`; None for onnxruntime's own.

        Raises:
            ArtifactError: onnxruntime refuses the file.
        """
        _share_memory()
        self._name, self._device, self._run = path.name, provider.device, run
        try:
            self._session = ort.InferenceSession(
                str(path), _options(threads, grows=grows), providers=_providers(provider)
            )
        except Exception as exc:
            raise ArtifactError(f"{path.name}: onnxruntime {ort.__version__} cannot open it: {exc}") from exc

    def run(self, feeds: Mapping[str, Value], wanted: Sequence[str]) -> list[Value]:
        """Run the whole graph and return the outputs named in ``wanted``, in the provider's memory.

        Raises:
            DataError: an id in the batch for which the model has no row.
            ConfigError: there is not enough memory.
            ArtifactError: onnxruntime refuses anything else: the graph does not take what the manifest says.
        """
        with told(self._name):
            if self._device == "cpu":
                return list(self._session.run_with_ort_values(list(wanted), dict(feeds), self._run))
            return self.run_bound(feeds, wanted)

    def run_bound(self, feeds: Mapping[str, Value], wanted: Sequence[str]) -> list[Value]:
        """The same by a binding, without which onnxruntime brings every output back to the CPU."""
        binding = self._session.io_binding()
        for name, value in feeds.items():
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding, self._run)
        return list(binding.get_outputs())


def run_options() -> Any:
    """Options that runs may share; with ``terminate`` set every run of theirs fails before its next operator."""
    options = ort.RunOptions()
    options.log_severity_level = _QUIET
    return options


@contextmanager
def told(graph: str) -> Iterator[None]:
    """Turn what onnxruntime raises while ``graph`` runs into an error of ours, on one line."""
    try:
        yield
    except FleetuneError:
        raise
    except Exception as exc:  # its errors have no root of their own
        raise _error_of(graph, exc) from exc


def _error_of(graph: str, exc: Exception) -> FleetuneError:
    said = str(exc)
    reason = (
        f"{graph}: onnxruntime {ort.__version__}: {one_line(' '.join(said.split()), length_max=_REASON_MAX)}"
    )
    if _NO_ROW in said:
        return DataError(f"the data holds an id for which the model has no row; {reason}")
    if isinstance(exc, MemoryError) or any(sign in said for sign in _NO_MEMORY):
        return ConfigError(
            f"not enough memory: take smaller batches or a memory budget (--memory-budget-mb); {reason}"
        )
    return ArtifactError(f"the graph does not run; {reason}")


def find_provider(name: str) -> Provider:
    """A provider that this onnxruntime has.

    Raises:
        UnknownName: nobody knows it.
        ConfigError: this build does not have it; names those it has.
    """
    found, have = PROVIDERS[name], ort.get_available_providers()
    if found.names[0] not in have:
        usable = [known for known, p in PROVIDERS.items() if p.names[0] in have]
        raise ConfigError(
            f"provider {name}: this build of onnxruntime {ort.__version__} has no {found.names[0]}; have: {choices(usable)}"
        )
    return found


def value_of(array: Array, device: str = "cpu") -> Value:
    """A value that shares the array's memory and keeps it alive; on another device than the CPU a copy."""
    return ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def array_of(value: Value) -> Array:
    """The value's content; shares its memory where onnxruntime allows."""
    return np.asarray(value.numpy())


def check_threads(threads: int) -> None:
    """Raise ConfigError for a number below 0."""
    if threads < 0:
        raise ConfigError(f"threads {threads}: expected 0 (one per core) or more")


@cache
def _share_memory() -> None:
    """One arena for every graph that grows by what is asked, not by doubling."""
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def _providers(provider: Provider) -> list[tuple[str, dict[str, str]]]:
    """Names with their options: products in whole float32, which newer GPUs else round to 10 bits of mantissa."""
    return [(name, {"use_tf32": "0"} if name == _CUDA else {}) for name in provider.names]


def _options(threads: int, *, grows: bool = False) -> Any:
    """Options of a session with a pool of its own: onnxruntime refuses any beside one pool for the process."""
    options = ort.SessionOptions()
    options.log_severity_level = _QUIET
    # Shapes vary by bucket: a pattern per shape would hold memory for each.
    options.enable_mem_pattern = False
    if grows:
        options.enable_cpu_mem_arena = False
    else:
        options.add_session_config_entry("session.use_env_allocators", "1")
    # Threads of a pool spin between operators; if they went on after the run, a chain of sessions would lose 30 %.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return options
