import logging

from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.overflow import EVERY_S, Overflow


def test_it_says_at_once_how_many_were_dropped_and_then_once_a_minute(caplog):
    link = Loopback().connect([])
    overflow, said = Overflow(link), []
    for now, dropped in (
        (0.0, 0),
        (1.0, 3),
        (2.0, 10),
        (3.0, 10),
        (1.0 + EVERY_S, 12),
        (2 * EVERY_S + 9, 12),
    ):
        link.dropped = dropped
        with caplog.at_level(logging.WARNING):
            overflow.tell(now)
        said += [record.getMessage().partition(" ")[0] for record in caplog.records]
        caplog.clear()
    assert said == ["3", "9"]
