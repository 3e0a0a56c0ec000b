"""Which storages of the frozen weights, and answers, a backend takes. Loads no torch, so that a slip is told at once."""

from fleetune.device_runtime.errors import ConfigError, ExportError, choices
from fleetune.device_runtime.tables import Table

BASE_DTYPES = ("fp32", "fp16", "int8", "int4")
STORAGES: Table[tuple[str, ...]] = Table(
    "backend", {"onnx": BASE_DTYPES, "executorch": ("fp32",), "ort-training": ("fp32",)}
)
"""By the names of ``backends.BACKENDS``."""
ANSWERS_OF_ANY_KIND = ("onnx", "executorch")
"""Backends that train regressions and label sets too; the others one class a row."""


def check_base_dtype(base_dtype: str, *, backend: str) -> None:
    """Refuse a storage that nobody knows, or that this backend's runtime does not take.

    Raises:
        UnknownName: no such backend.
        ConfigError: no such dtype.
        ExportError: the runtime cannot compute with it.
    """
    taken = STORAGES[backend]
    if base_dtype not in BASE_DTYPES:
        raise ConfigError(f"--base-dtype {base_dtype}: no such storage; have: {choices(BASE_DTYPES)}")
    if base_dtype not in taken:
        raise ExportError(
            f"--base-dtype {base_dtype}: the {backend} runtime does not take it; it takes {choices(taken)}"
        )
