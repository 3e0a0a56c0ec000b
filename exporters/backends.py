"""The backends: who writes an artifact.

Adding one is a folder, a row here and one in ``storages``, and a loader on the device; deleting one is the reverse.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Protocol

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.tables import Table
from fleetune.exporters.assembly import Description
from fleetune.exporters.block_graphs import write_block_graphs
from fleetune.exporters.executorch.graphs import CONVERTERS as EXECUTORCH
from fleetune.exporters.model.program import Program
from fleetune.exporters.onnx.graphs import CONVERTERS as ONNX
from fleetune.exporters.ort_training.writing import write_ort_training


class Write(Protocol):
    """Exports a program into a folder; see :func:`fleetune.exporters.writing.write_artifact`."""

    def __call__(
        self,
        program: Program,
        description: Description,
        out: Path,
        *,
        base_dtype: str = "fp32",
        on_progress: Callable[[str], None] = ...,
    ) -> Manifest:
        """Write the artifact and return its manifest."""


BACKENDS: Table[Write] = Table(
    "backend",
    {
        "onnx": partial(write_block_graphs, backend="onnx", converters=ONNX),
        "executorch": partial(write_block_graphs, backend="executorch", converters=EXECUTORCH),
        "ort-training": write_ort_training,
    },
)
