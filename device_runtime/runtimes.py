"""Which stack runs an artifact: block graphs are chained by :class:`Stack`, whole models by :class:`OrtTrainingStack`."""

from device_runtime.artifact import Artifact
from device_runtime.ort_training import OrtTrainingStack
from device_runtime.stack import Stack
from device_runtime.tables import Table

STACKS: Table[type[Stack]] = Table(
    "backend that this device can run",
    {"onnx": Stack, "executorch": Stack, "ort-training": OrtTrainingStack},
)


def open_stack(artifact: Artifact, *, threads: int = 0, recompute: bool = False) -> Stack:
    """The stack for the artifact's backend; arguments as of :class:`Stack`.

    Raises:
        UnknownName: a backend that this version does not run.
        ConfigError: the runtime is not installed here, or cannot recompute.
    """
    return STACKS[artifact.manifest.backend](artifact, threads=threads, recompute=recompute)


def recompute_modes(artifact: Artifact) -> tuple[bool, ...]:
    """The values of ``recompute`` with which the artifact can be opened."""
    return (False, True) if STACKS[artifact.manifest.backend] is Stack else (False,)
