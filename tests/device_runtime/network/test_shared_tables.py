"""Properties of packets with shared tables: the bytes and the refusals of paho's own."""

from importlib.util import find_spec, module_from_spec

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import MQTTException

from fleetune.device_runtime.network.client import share_tables

VALUES = {"Byte": 1, "Two Byte Integer": 7, "Four Byte Integer": 70_000, "Variable Byte Integer": 300}
VALUES |= {"Binary Data": b"\0x", "UTF-8 Encoded String": "é", "UTF-8 String Pair": [("a", "b"), ("c", "d")]}


def fresh():
    """paho's class, as nobody has touched it."""
    module = module_from_spec(find_spec("paho.mqtt.properties"))
    module.__spec__.loader.exec_module(module)
    return module.Properties


@pytest.fixture
def both():
    """Make properties of a packet as paho does, and with shared tables."""
    own, shared = fresh(), fresh()
    assert share_tables(shared), "paho makes its tables in another way"
    return lambda kind: (own(kind), shared(kind))


def test_every_property_of_every_packet_has_the_same_bytes(both):
    tried = 0
    for name, identifier in both(PacketTypes.PUBLISH)[0].names.items():
        for kind in PacketTypes.indexes:
            one, other = both(kind)
            value = VALUES[one.types[one.properties[identifier][0]]]
            found = [_set(each, name.replace(" ", ""), value) for each in (one, other)]
            assert found[0] == found[1]
            if found[0] is not None:
                tried += 1
                back = both(kind)[1]
                back.unpack(found[0])
                assert back.pack() == found[0]
    assert tried > 50


def _set(one, name, value):
    try:
        setattr(one, name, value)
    except MQTTException:
        return None
    return one.pack()


def test_what_one_packet_says_another_does_not(both):
    one, other = (both(PacketTypes.PUBLISH)[1] for _ in range(2))
    one.ContentType = "x"
    assert not hasattr(other, "ContentType")
    assert (other.pack(), other.packetType) == (b"\0", PacketTypes.PUBLISH)


def test_a_paho_that_keeps_more_is_left_as_it_is():
    class Other(fresh()):
        def __init__(self, packetType):
            super().__init__(packetType)
            object.__setattr__(self, "more", 1)

    own = Other.__init__
    assert not share_tables(Other)
    assert Other.__init__ is own
