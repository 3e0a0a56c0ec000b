"""What the operator hears of links that are slow, or break."""

import pytest

from fleetune.broker.service.slow_links import CUTS, SlowLinks


def said_by(caplog, *events):
    links = SlowLinks()
    for kind, fields in events:
        getattr(links, kind)("kitchen", **fields)
    return [record.getMessage() for record in caplog.records]


def came(seconds, times=1.0, size_bytes=320_000):
    return "came", {
        "size_bytes": size_bytes,
        "received_bytes": int(times * size_bytes),
        "seconds": seconds,
    }


BROKE = "broke", {"share": 0.4}


def test_a_slow_update_is_told_once_with_its_pace(caplog):
    (said,) = said_by(caplog, came(100.0), came(110.0), came(90.0))
    assert said.startswith("slow link: the update of kitchen, 320 kB, took 100 s (3.2 kB/s); ")


def test_one_that_becomes_twice_as_slow_is_told_again(caplog):
    assert len(said_by(caplog, came(100.0), came(201.0))) == 2


def test_bytes_that_came_twice_are_told(caplog):
    (said,) = said_by(caplog, came(10.0, times=1.5))
    assert "1.5 times its bytes came" in said


@pytest.mark.parametrize("event", [came(59.0), came(5.0, times=1.1), BROKE])
def test_an_ordinary_link_is_not_told(caplog, event):
    assert said_by(caplog, event) == []


def test_connections_that_break_under_one_update_are_told_every_third_time(caplog):
    said = said_by(caplog, *[BROKE] * (2 * CUTS))
    assert [one.partition(" times")[0] for one in said] == [
        f"broken link: the connection of kitchen broke {n}" for n in (CUTS, 2 * CUTS)
    ]
    assert "40 % is here" in said[0]


def test_an_update_that_came_ends_the_count(caplog):
    assert said_by(caplog, *[BROKE] * (CUTS - 1), came(1.0), BROKE) == []
