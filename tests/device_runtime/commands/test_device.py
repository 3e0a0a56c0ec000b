from types import SimpleNamespace

import pytest

from fleetune.device_runtime.commands import device
from fleetune.device_runtime.commands.systemd import Service
from fleetune.device_runtime.errors import TransportError


class Link:
    """Nothing ever comes; waiting for it moves the pretended clock."""

    address = SimpleNamespace(shown="mqtt://here")

    def __init__(self, clock):
        self.clock = clock

    def receive(self, timeout_s):
        self.clock.now += timeout_s


class Agent:
    """Is paused until a time, and finished at another; it never has anything to do at once."""

    heard_at = 0.0

    def __init__(self, clock, *, paused_until, finished_at):
        self.clock, self.paused_until, self.finished_at = clock, paused_until, finished_at

    @property
    def finished(self):
        return self.clock.now >= self.finished_at

    @property
    def is_paused(self):
        return self.clock.now < self.paused_until

    def poll(self, now):
        return False


@pytest.fixture
def clock(monkeypatch):
    pretended = SimpleNamespace(now=0.0)
    monkeypatch.setattr(device.time, "monotonic", lambda: pretended.now)
    return pretended


def live(clock, **times):
    device._live(Agent(clock, **times), Link(clock), service=Service({}), idle_limit_s=10)


def test_a_pause_is_not_idleness(clock):
    live(clock, paused_until=100, finished_at=109)
    assert clock.now == pytest.approx(109, abs=0.2)


def test_idleness_is_counted_from_the_end_of_a_pause(clock):
    with pytest.raises(TransportError, match="mqtt://here: no word of an aggregator for 10 s"):
        live(clock, paused_until=100, finished_at=200)
    assert clock.now == pytest.approx(110, abs=0.5)
