"""Opens an artifact by its backend: :class:`Stack` chains graphs of blocks, :class:`OrtTrainingEngine` runs whole models."""

from collections.abc import Callable

from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.engine.engine import Engine, Setup
from fleetune.device_runtime.engine.loaders import executorch_loader, onnx_loader
from fleetune.device_runtime.engine.ort_training import OrtTrainingEngine
from fleetune.device_runtime.engine.stack import Stack
from fleetune.device_runtime.tables import Table


def open_engine(
    artifact: Artifact,
    *,
    threads: int = 0,
    memory: MemoryPlan = SAVE_ALL,
    provider: str = "cpu",
    in_lanes: bool = True,
    most_step_s: float = 0.0,
) -> Engine:
    """Open an artifact; arguments as the fields of :class:`Setup`.

    Raises:
        UnknownName: a backend that this version does not run, or a provider that nobody knows.
        ConfigError: a number below 0, a provider or runtime that is not here, or a memory plan that it cannot follow.
    """
    return BACKENDS[artifact.manifest.backend](
        artifact, Setup(threads, memory, provider, in_lanes, most_step_s)
    )


def _onnx(artifact: Artifact, setup: Setup) -> Engine:
    return Stack(artifact, onnx_loader(setup.threads, setup.provider), setup)


def _executorch(artifact: Artifact, setup: Setup) -> Engine:
    return Stack(artifact, executorch_loader(setup.threads, setup.provider), setup)


BACKENDS: Table[Callable[[Artifact, Setup], Engine]] = Table(
    "backend that this device can run",
    {"onnx": _onnx, "executorch": _executorch, "ort-training": OrtTrainingEngine},
)
