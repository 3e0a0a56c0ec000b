"""Who writes the artifact of a backend: block graphs have one writer, whole models per depth another."""

from collections.abc import Callable
from typing import NamedTuple

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.tables import Table
from fleetune.exporters.backends import BACKENDS
from fleetune.exporters.ort_training.writing import write_ort_training
from fleetune.exporters.writing import write_artifact


class Writer(NamedTuple):
    """``write(program, description, out, *, backend, base_dtype, on_progress) -> manifest``, and what frozen weights may be."""

    write: Callable[..., Manifest]
    base_dtypes: tuple[str, ...]


WRITERS = Table(
    "backend",
    {
        **{name: Writer(write_artifact, backend.base_dtypes) for name, backend in BACKENDS.items()},
        "ort-training": Writer(write_ort_training, ("fp32",)),
    },
)
