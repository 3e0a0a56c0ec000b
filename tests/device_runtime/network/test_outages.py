import logging

from fleetune.device_runtime.network.outages import Outages


class Standing:
    connected, connections = True, 1


def test_an_outage_is_told_once_when_it_begins_and_once_when_it_ends(caplog):
    link, now = Standing(), [0.0]
    outages = Outages(link, "mqtt://server:1883", clock=lambda: now[0])
    with caplog.at_level(logging.WARNING):
        outages.look()
        link.connected = False
        for now[0] in (1.0, 13.0, 26.0):
            outages.look()
        link.connected, link.connections = True, 2
        outages.look()
        outages.look()
    assert [record.getMessage() for record in caplog.records] == [
        "mqtt://server:1883: the MQTT server is away; everything goes on when it is back",
        "mqtt://server:1883: the MQTT server is back after 25 s",
    ]


def test_one_that_nobody_saw_is_told_afterwards(caplog):
    link = Standing()
    outages = Outages(link, "mqtt://server:1883")
    link.connections = 2
    outages.look()
    outages.look()
    assert caplog.text.count("the MQTT server was away, and is back") == 1
