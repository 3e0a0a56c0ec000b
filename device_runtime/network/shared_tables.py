"""paho's tables of MQTT 5 properties, made once.

paho 2.2 makes them anew for each packet that comes: 6 % of what an aggregator of many devices computes (docs/scale.md).
"""

from functools import cache

from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

_TABLES = {"types", "names", "properties"}
"""Attributes of a new object beside its packet's type; nobody writes to them."""


@cache
def share_tables() -> bool:
    """Let all properties of this process have the same tables; False, and nothing is done, where they are made otherwise."""
    made = vars(Properties(PacketTypes.PUBLISH)).copy()  # type: ignore[no-untyped-call]
    if made.keys() != _TABLES | {"packetType"}:
        return False
    del made["packetType"]

    def start(self: Properties, packetType: int) -> None:
        vars(self).update(made, packetType=packetType)

    Properties.__init__ = start  # type: ignore[method-assign]
    return True
