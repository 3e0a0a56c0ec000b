"""The door of the exporters: a program and its description become an artifact folder."""

from collections.abc import Callable
from pathlib import Path

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.exporters.assembly import Description
from fleetune.exporters.backends import BACKENDS
from fleetune.exporters.model.program import Program
from fleetune.exporters.storages import check_base_dtype

__all__ = ["Description", "write_artifact"]


def write_artifact(
    program: Program,
    description: Description,
    out: Path,
    *,
    backend: str = "onnx",
    base_dtype: str = "fp32",
    on_progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Export ``program`` into the folder ``out`` (replaced if it is an artifact already).

    Unless ``base_dtype`` is fp32, the golden step is that of the module with its frozen weights rounded as they are stored.

    Raises:
        ConfigError: no such backend or storage of frozen weights.
        ExportError: no blocks, a trainable tensor that cannot learn, a loss that is no mean, an operator without translation, a
            storage that the backend does not take, or a folder in the way.
    """
    check_base_dtype(base_dtype, backend=backend)
    return BACKENDS[backend](program, description, out, base_dtype=base_dtype, on_progress=on_progress)
