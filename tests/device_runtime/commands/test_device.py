from math import inf
from types import SimpleNamespace

import numpy as np
import pytest

from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.commands import device
from fleetune.device_runtime.commands.own_folder import identify, state_folder
from fleetune.device_runtime.commands.predict import predict
from fleetune.device_runtime.commands.silence import Silence
from fleetune.device_runtime.commands.systemd import Notifier
from fleetune.device_runtime.contracts.adapters import load_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.errors import StateError, TransportError
from fleetune.device_runtime.files import DiskFiles, alone_in
from fleetune.device_runtime.terms.terms import Terms


class Link:
    """Nothing ever comes; waiting for it moves the pretended clock."""

    address, dropped = SimpleNamespace(shown="mqtt://here"), 0

    def __init__(self, clock):
        self.clock, self.waits = clock, []

    def receive(self, timeout_s):
        assert timeout_s > 0
        self.waits.append(timeout_s)
        self.clock.now += timeout_s


class Agent:
    """Is paused until a time, and finished at another; has something to do at ``due`` times only."""

    heard_at, has_status = 0.0, True

    def __init__(self, clock, *, paused_until=0.0, finished_at, due=()):
        self.clock, self.paused_until, self.finished_at = clock, paused_until, finished_at
        self.due, self.polled = sorted({*due, paused_until, finished_at}), []
        self.is_paused = False

    @property
    def finished(self):
        return self.clock.now >= self.finished_at

    def poll(self, now):
        self.polled.append(now)
        self.is_paused = now < self.paused_until
        return False

    def due_at(self, now):
        return next((time for time in self.due if time > now), inf)


@pytest.fixture
def clock(monkeypatch):
    pretended = SimpleNamespace(now=0.0)
    monkeypatch.setattr(device.time, "monotonic", lambda: pretended.now)
    return pretended


def run(agent, link, *, notifier=None, idle_limit_s=0):
    silence = Silence("mqtt://here", job="home", advice="let kitchen in")
    device._live(agent, link, notifier=notifier or Notifier({}), silence=silence, idle_limit_s=idle_limit_s)


def live(clock, *, idle_limit_s=10, **times):
    agent = Agent(clock, **times)
    run(agent, Link(clock), idle_limit_s=idle_limit_s)
    return agent


def test_a_pause_is_not_idleness(clock):
    live(clock, paused_until=100, finished_at=109)
    assert clock.now == 109


def test_idleness_is_counted_from_the_end_of_a_pause(clock):
    with pytest.raises(TransportError, match="mqtt://here: no word of an aggregator for 10 s"):
        live(clock, paused_until=100, finished_at=200)
    assert clock.now == 110


def test_it_sleeps_until_something_is_due_and_no_longer(clock):
    agent = live(clock, finished_at=70, due=[0.5, 30.0], idle_limit_s=0)
    assert agent.polled == [0.0, 0.5, 30.0]


def test_what_is_due_at_once_waits_for_no_message(clock):
    agent = Agent(clock, finished_at=1)
    agent.due_at = lambda now: now if len(agent.polled) < 3 else 1.0
    link = Link(clock)
    run(agent, link)
    assert (len(agent.polled), link.waits) == (3, [1.0])


def test_systemd_is_fed_while_nothing_is_due(clock, monkeypatch):
    said = []
    monkeypatch.setattr("fleetune.device_runtime.commands.systemd._send", lambda _, words: said.append(words))
    watched = {"NOTIFY_SOCKET": "/there", "WATCHDOG_USEC": "2000000"}
    notifier = Notifier(watched, clock=lambda: clock.now)
    run(Agent(clock, finished_at=3), Link(clock), notifier=notifier)
    assert said == ["WATCHDOG=1"] * 6


def test_a_device_that_hears_in_a_poll_that_the_job_is_over_leaves_at_once(clock):
    link, agent = Link(clock), Agent(clock, finished_at=inf)
    agent.poll = lambda now: setattr(agent, "finished_at", now)
    run(agent, link)
    assert link.waits == []


@pytest.mark.parametrize("kept", [b"\xff\xfe", b"a/b", b""])
def test_an_id_that_was_damaged_is_told(kept):
    outbox = MemoryOutbox()
    outbox.remember("device_id", kept)
    with pytest.raises(StateError, match=r"the device's id is damaged .*; give it as --id"):
        identify(outbox, None)
    assert identify(outbox, "pi") == "pi"


@pytest.mark.parametrize(
    ("heard_at", "has_status", "said"),
    [
        (0.0, False, "no word of an aggregator yet: is one at work on job 'home' at this server? If so, let kitchen in"),
        (1.0, False, "messages come and no status of the aggregator: may this device read fleetune/v1/home/aggregator/status?"),
        (1.0, True, None),
    ],
)  # fmt: skip
def test_a_device_that_hears_nothing_says_so_after_half_a_minute_and_every_ten(
    clock, caplog, heard_at, has_status, said
):
    agent = Agent(clock, finished_at=700)
    agent.heard_at, agent.has_status = heard_at, has_status
    run(agent, Link(clock))
    assert caplog.messages == ([f"mqtt://here: {said}"] * 2 if said else [])


@pytest.mark.parametrize(
    ("given", "login", "wanted"),
    [
        ("pi", "kitchen", "pi"),
        (None, "kitchen", "kitchen"),
        (None, "a b", "device-"),
        (None, None, "device-"),
    ],
)
def test_a_device_is_called_as_it_logs_in_unless_it_has_a_name(given, login, wanted):
    outbox = MemoryOutbox()
    made = identify(outbox, given, login)
    assert made.startswith(wanted)
    assert given or identify(outbox, None, "another") == made, "kept"


def test_a_denied_device_is_told_which_name_would_do():
    identity = Identity("device-1", "home", "a" * 64)
    assert (
        "user 'kitchen' read and write fleetune/v1/home/device/device-1/#"
        in device._party(identity, "kitchen").denied
    )
    assert "give --id kitchen, or log in as 'device-1'" in device._party(identity, "kitchen").denied
    assert "--id" not in device._party(Identity("kitchen", "home", "a" * 64), "kitchen").denied


def test_a_state_folder_that_is_made_is_its_owners_alone_and_one_that_is_there_stays(tmp_path):
    made = state_folder(tmp_path / "state", job="home", device_id=None)
    assert made.stat().st_mode & 0o777 == 0o700
    made.chmod(0o750)
    assert state_folder(made, job="home", device_id=None).stat().st_mode & 0o777 == 0o750


def test_a_state_folder_in_which_nothing_can_be_written_is_told(tmp_path):
    (tmp_path / "lock").mkdir()
    with pytest.raises(StateError, match="cannot be written: Is a directory"), alone_in(tmp_path, "taken"):
        pass


def test_the_owners_model_is_an_adapter_folder_that_predict_takes(word_artifact, word_file, tmp_path):
    artifact, folder = open_artifact(word_artifact), tmp_path / "state" / device.OWN_MODEL
    options = {"kept": None, "own": folder, "files": DiskFiles(tmp_path), "terms": Terms()}
    desk = device._Desk(artifact, word_file, Columns(), None, Notifier({}), lambda _: None, **options)
    own = {name: value + np.float32(0.25) for name, value in artifact.adapter().items()}
    desk.workbench(tells_labels=False).keep(own)
    found = load_peft(folder, artifact.manifest)
    assert all(np.array_equal(found[name], own[name]) for name in own)
    mine, version_0 = (predict(word_artifact, text="red", adapter=a, threads=1)[0] for a in (folder, None))
    assert mine.score != version_0.score
