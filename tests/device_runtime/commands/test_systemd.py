"""A process as systemd's service, seen from a real datagram socket at systemd's end."""

import os
import secrets
import socket
from concurrent.futures import ThreadPoolExecutor
from math import inf
from types import SimpleNamespace

import pytest
from flat import aggregate, device

from fleetune.device_runtime.commands.systemd import Notifier

WATCHED = {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": str(os.getpid())}  # beats every 0.5 s


class Systemd:
    """Systemd's end of the notification socket."""

    def __init__(self, address):
        self.address = address
        self._end = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._end.bind("\0" + address[1:] if address.startswith("@") else address)
        self._end.settimeout(0)

    def heard(self):
        """Every word since the last call, a list of lines each."""
        words = []
        while True:
            try:
                words.append(self._end.recv(4096).decode().split("\n"))
            except BlockingIOError:
                return words

    def close(self):
        self._end.close()


@pytest.fixture(params=["path", "abstract"])
def systemd(request, tmp_path):
    # A socket's path holds 107 bytes at most, and pytest's folders may be deeper.
    os.symlink(tmp_path, short := f"/tmp/fleetune-{secrets.token_hex(4)}")
    name = f"@fleetune/{secrets.token_hex(4)}" if request.param == "abstract" else f"{short}/notify"
    end = Systemd(name)
    yield end
    end.close()
    os.unlink(short)


@pytest.fixture
def clock():
    return SimpleNamespace(now=0.0)


def notifier_of(systemd, clock, **environment):
    return Notifier({"NOTIFY_SOCKET": systemd.address, **environment}, clock=lambda: clock.now)


def test_a_life(systemd, clock):
    notifier = notifier_of(systemd, clock, **WATCHED)
    notifier.status = "waiting"
    notifier.ready()
    notifier.beat()
    notifier.status = "round 1:\nstep 2"
    clock.now = 1.0
    notifier.beat()
    notifier.stopping()
    assert systemd.heard() == [
        ["READY=1", "STATUS=waiting"],
        ["WATCHDOG=1"],
        ["WATCHDOG=1", "STATUS=round 1: step 2"],
        ["STOPPING=1"],
    ]


def test_the_watchdog_is_fed_four_times_in_its_interval_however_often_it_is_asked(systemd, clock):
    notifier = notifier_of(systemd, clock, **WATCHED)
    for _ in range(2000):  # 2 s
        notifier.beat()
        clock.now += 0.001
    assert systemd.heard() == [["WATCHDOG=1"]] * 4


@pytest.mark.parametrize(
    "environment",
    [{}, {"WATCHDOG_USEC": "2000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}],
    ids=["none", "of another process", "nonsense"],
)
def test_without_a_watchdog_of_its_own_it_tells_only_news(systemd, clock, environment):
    notifier = notifier_of(systemd, clock, **environment)
    notifier.status = "round 1"
    for clock.now in range(5):
        notifier.beat()
    assert systemd.heard() == [["STATUS=round 1"]]


def test_it_is_due_when_it_has_something_to_say(systemd, clock):
    notifier = notifier_of(systemd, clock)
    assert notifier.due_at == inf, "no watchdog, no news"
    notifier.status = "round 1"
    assert notifier.due_at <= clock.now
    notifier.beat()
    assert notifier.due_at == inf
    notifier.status = "round 2"
    assert notifier.due_at == 1.0, "one word a second"
    watched = notifier_of(systemd, clock, **WATCHED)
    watched.beat()
    assert (watched.due_at, Notifier({}).due_at) == (0.5, inf)


def test_without_systemd_it_opens_no_socket(monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_: pytest.fail("a socket was opened"))
    notifier = Notifier({})
    notifier.status = "round 1"
    notifier.ready()
    notifier.beat()
    notifier.stopping()


def test_a_systemd_that_does_not_read_stops_nothing_and_hears_the_status_later(systemd, clock):
    notifier = notifier_of(systemd, clock, **WATCHED)
    for clock.now in range(10_000):
        notifier.status = f"step {clock.now}"
        notifier.beat()
    assert len(systemd.heard()) < 10_000
    clock.now += 1
    notifier.beat()
    assert systemd.heard() == [["WATCHDOG=1", f"STATUS={notifier.status}"]]


def test_a_socket_that_is_gone_is_warned_of_once(systemd, clock, caplog):
    notifier = notifier_of(systemd, clock, **WATCHED)
    systemd.close()
    notifier.ready()
    clock.now = 1.0
    notifier.beat()
    assert [r.getMessage()[:20] for r in caplog.records] == ["no word to systemd: "]


def test_a_device_tells_of_its_rounds(systemd, word_artifact, word_file, mosquitto, tmp_path, monkeypatch):

    monkeypatch.setenv("NOTIFY_SOCKET", systemd.address)
    monkeypatch.setenv("WATCHDOG_USEC", "40000")  # fed every 10 ms, so that a short life feeds it often
    words = []
    options = {"mqtt": mosquitto.url, "job": "home"}
    own = {
        "data": word_file,
        "state": tmp_path / "state",
        "threads": 1,
        "on_event": lambda _: words.extend(systemd.heard()),  # the kernel keeps ten words, no more
    }
    work = {
        "rounds": 2,
        "clients": 1,
        "local_steps": 2,
        "batch_size": 24,
        "seq_len": 8,
        "out": tmp_path / "run",
    }
    with ThreadPoolExecutor() as pool:
        running = pool.submit(aggregate, word_artifact, **options, **work)
        device(word_artifact, **options, **own)
        running.result()
    words += systemd.heard()
    lines = [line for word in words for line in word]
    assert words[0] == ["READY=1", "STATUS=job home: waiting for the aggregator"]
    assert "WATCHDOG=1" in lines
    assert any(line.startswith("STATUS=round 1: ") for line in lines)
    assert not any("step: step" in line for line in lines)
    assert words[-1][0] == "STOPPING=1"
    assert words[-1][1].startswith("STATUS=round 2: finished")
