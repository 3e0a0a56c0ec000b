"""The backends: who writes an artifact, and what its frozen weights may be.

Adding one is a folder and a row here, and a loader on the device; deleting one is the reverse.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

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


class Backend(NamedTuple):
    """Who writes the artifact, and the storages of frozen weights that its runtime takes."""

    write: Write
    base_dtypes: tuple[str, ...] = ("fp32",)


BACKENDS: Table[Backend] = Table(
    "backend",
    {
        "onnx": Backend(
            partial(write_block_graphs, backend="onnx", converters=ONNX), ("fp32", "fp16", "int8")
        ),
        "executorch": Backend(partial(write_block_graphs, backend="executorch", converters=EXECUTORCH)),
        "ort-training": Backend(write_ort_training),
    },
)
