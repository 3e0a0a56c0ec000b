"""What runs on a device: contracts, engine, trainer, agent. Never imports torch.

``train``, ``predict`` and ``inspect`` are imported when first used. ``device`` and ``selfcheck`` are in the modules of
their names.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from device_runtime.inspection import inspect
    from device_runtime.prediction import predict
    from device_runtime.training import train

__all__ = ["inspect", "predict", "train"]

_HOMES = {
    "inspect": "device_runtime.inspection",
    "predict": "device_runtime.prediction",
    "train": "device_runtime.training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
