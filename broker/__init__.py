"""Server side of MQTT: the aggregator service, its rounds and strategies, and MQTT servers.

``aggregate`` and ``EmbeddedServer`` are imported when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from broker.aggregation import aggregate
    from broker.embedded import EmbeddedServer

__all__ = ["EmbeddedServer", "aggregate"]

_HOMES = {"EmbeddedServer": "broker.embedded", "aggregate": "broker.aggregation"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
