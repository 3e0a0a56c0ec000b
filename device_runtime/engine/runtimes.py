"""Which stack runs an artifact: block graphs are chained by :class:`Stack`, whole models by :class:`OrtTrainingStack`."""

from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.engine.ort_training import OrtTrainingStack
from fleetune.device_runtime.engine.stack import Stack
from fleetune.device_runtime.tables import Table

STACKS: Table[type[Stack]] = Table(
    "backend that this device can run",
    {"onnx": Stack, "executorch": Stack, "ort-training": OrtTrainingStack},
)


def open_stack(
    artifact: Artifact,
    *,
    threads: int = 0,
    memory: MemoryPlan = SAVE_ALL,
    provider: str = "cpu",
    in_lanes: bool = True,
) -> Stack:
    """The stack for the artifact's backend; arguments as of :class:`Stack`.

    Raises:
        UnknownName: a backend that this version does not run.
        ConfigError: the runtime is not installed here, or cannot follow that memory plan.
    """
    stack = STACKS[artifact.manifest.backend]
    return stack(artifact, threads=threads, memory=memory, provider=provider, in_lanes=in_lanes)


def can_plan_memory(artifact: Artifact) -> bool:
    """Whether the artifact can be opened with any memory plan but ``SAVE_ALL``."""
    return STACKS[artifact.manifest.backend] is Stack
