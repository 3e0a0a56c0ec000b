"""Devices and aggregators whose name, login or place is another's: told in words by a real Mosquitto's refusals."""

import getpass
import json
import shutil
import time
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import pytest
from background import begin
from certificates import Authority
from flat import FEW_SAMPLES
from servers import free_port, password_file

from fleetune.broker import aggregation
from fleetune.broker.aggregation import aggregate
from fleetune.broker.jobs.settings import Job
from fleetune.broker.servers.listeners import Tls
from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.device_runtime.agent.identity import Duty
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.wire import aggregator_topic, decode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import TransportError
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.link import Link

ONE = Resources(threads=1)
WORK = LocalWork(steps=2, batch_size=4, codec="int8")


@pytest.fixture
def guarded(tmp_path, start_mosquitto):
    """A Mosquitto as operators configure it, with logins for aggregator and kitchen."""
    passwords, port = password_file(tmp_path, aggregator="a1", kitchen="k1"), free_port()
    path = write_configuration(
        tmp_path / "conf", port=port, host="127.0.0.1", password_file=passwords, user=getpass.getuser()
    )
    return start_mosquitto(configuration=path, port=port)


def url(server, user, password, version=""):
    return f"mqtt://{user}:{password}@127.0.0.1:{server.port}{version}"


def run_device(artifact, data, server_url, state, *, job="home", idle_limit_s=60.0, **options):
    duty = Duty(idle_limit_s=idle_limit_s)
    return device(
        artifact, data=data, mqtt=server_url, job=job, state=state, duty=duty, resources=ONE, terms=FEW_SAMPLES, **options
    )  # fmt: skip


def test_a_login_alone_is_enough_of_a_name(guarded, word_artifact, word_file, tmp_path):
    serving = begin(
        aggregate, word_artifact, mqtt=url(guarded, "aggregator", "a1"), job=Job("home", rounds=1, clients=1),
        work=WORK, out=tmp_path / "run",
    )  # fmt: skip
    report = run_device(word_artifact, word_file, url(guarded, "kitchen", "k1"), tmp_path / "state")
    assert (report.device_id, report.rounds, serving.result(60).rounds) == ("kitchen", 1, 1)
    said = (tmp_path / "run" / "run.json").read_text()
    assert "a1" not in json.loads(said)["arguments"]["mqtt"]


def test_a_name_that_is_not_the_login_is_told_with_the_cure(guarded, word_artifact, word_file, tmp_path):
    with pytest.raises(
        TransportError, match=r"Not authorized; .*\(ACL\).* give --id kitchen, or log in as 'pi'"
    ):
        run_device(word_artifact, word_file, url(guarded, "kitchen", "k1"), tmp_path / "state", id="pi")


def test_where_denials_are_silent_the_silence_is_told(
    guarded, word_artifact, word_file, tmp_path, caplog, monkeypatch
):
    """MQTT 3.1.1 has no answer to a denied message."""
    monkeypatch.setattr("fleetune.device_runtime.commands.silence.FIRST_S", 0.5)
    with pytest.raises(TransportError, match=r"no word of an aggregator for 1 s: .* give --id kitchen"):
        run_device(
            word_artifact, word_file, url(guarded, "kitchen", "k1", "?version=3.1.1"), tmp_path / "state", id="pi",
            idle_limit_s=1.0,
        )  # fmt: skip
    assert "no word of an aggregator yet: is one at work on job 'home'" in caplog.text
    assert "k1" not in caplog.text


def test_an_aggregator_with_a_devices_login_is_told(guarded, word_artifact, tmp_path):
    with pytest.raises(
        TransportError, match="Not authorized; the aggregator's user must be let read and write"
    ):
        aggregate(
            word_artifact, mqtt=url(guarded, "kitchen", "k1"), job=Job("home", rounds=1, clients=1), work=WORK,
            out=tmp_path / "run",
        )  # fmt: skip


@pytest.mark.parametrize("right", ["read", "write"])
def test_an_aggregator_that_may_only_read_or_only_write_is_told(
    guarded, tmp_path, caplog, monkeypatch, right
):
    """Of a message that it may not read nobody tells a client, and MQTT 3.1.1 has no answer to one that it may not write."""
    monkeypatch.setattr("fleetune.broker.service.rivals.ANSWER_S", 0.5)
    (tmp_path / "conf" / "fleetune.acl").write_text(f"user aggregator\ntopic {right} fleetune/v1/#\n")
    guarded.stop()
    guarded.start()
    aggregation._check_alone(url(guarded, "aggregator", "a1", "?version=3.1.1"), "home", Reach())
    assert (
        "aggregator/status does not come back: the aggregator's user must be let read and write"
        in caplog.text
    )


def first_of(tasks, timeout_s=40):
    done, _ = wait(tasks, timeout_s, FIRST_COMPLETED)
    assert done, "none has stopped"
    return done.pop()


def test_of_two_aggregators_of_one_job_one_stops_and_says_why(
    mosquitto, word_artifact, word_file, tmp_path, monkeypatch
):
    """They begin at the same moment: each asks whether another is there before one is."""
    monkeypatch.setattr("fleetune.broker.aggregation._check_alone", lambda *_: None)

    def serve(name):
        job = Job("home", rounds=1, clients=1)
        try:
            return aggregate(
                word_artifact, mqtt=mosquitto.url, job=job, work=WORK, out=tmp_path / name
            ).rounds
        except TransportError as exc:
            return str(exc)

    tasks = [begin(serve, name) for name in ("a", "b")]
    stopped = first_of(tasks)
    run_device(word_artifact, word_file, mosquitto.url, tmp_path / "state")
    assert sorted(str(task.result(60)) for task in tasks)[0] == "1"
    taken = "another aggregator works on job 'home'; stop one of them, or give each its own --job"
    assert stopped.result().endswith(taken)


def test_of_two_devices_of_one_name_one_stops_and_the_job_is_done_by_the_other(
    mosquitto, word_artifact, word_file, tmp_path
):
    def live(name):
        try:
            return run_device(word_artifact, word_file, mosquitto.url, tmp_path / name, id="pi").rounds
        except TransportError as exc:
            return str(exc)

    devices = [begin(live, name) for name in ("a", "b")]
    stopped = first_of(devices)
    assert "another device named 'pi' uses this id; give each its own --id" in stopped.result()
    job = Job("home", rounds=2, clients=1)
    report = aggregate(word_artifact, mqtt=mosquitto.url, job=job, work=WORK, out=tmp_path / "run")
    (other,) = [task for task in devices if task is not stopped]
    assert (report.rounds, other.result(60)) == (2, 2)


def another(artifact, folder):
    """The same model under another name: an artifact of its own."""
    shutil.copytree(artifact, folder)
    manifest = json.loads((folder / "manifest.json").read_bytes())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "name": "another"}))
    return folder


def wait_for_aggregator(url, job):
    """Until the status of a run before, which says that the job is over, is replaced: who was in that would leave again."""
    with Link(url, client_id="watcher", topics=[aggregator_topic(job)]) as link:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            if (message := link.receive(1.0)) and not decode(message[1]).finished:
                return
    raise AssertionError("no aggregator came")


def test_for_another_job_change_job_and_start_it(mosquitto, word_artifact, word_file, tmp_path):
    """As docs/raspberry-pi.md has it, with one state folder, from one to another artifact and back."""
    other = another(word_artifact, tmp_path / "other")
    for number, (job, artifact) in enumerate(
        [("a", word_artifact), ("b", word_artifact), ("a", other), ("a", word_artifact)]
    ):
        serving = begin(
            aggregate, artifact, mqtt=mosquitto.url, job=Job(job, rounds=2, clients=1, seed=number), work=WORK,
            out=tmp_path / f"run{number}",
        )  # fmt: skip
        wait_for_aggregator(mosquitto.url, job)
        report = run_device(artifact, word_file, mosquitto.url, tmp_path / "state", job=job, id="pi")
        assert (report.rounds, report.refused, serving.result(60).rounds) == (2, 0, 2)


def test_certificates_are_logins_too(word_artifact, word_file, tmp_path, start_mosquitto):
    authority, port = Authority(tmp_path / "ca"), free_port()
    tls = Tls(*map(Path, authority.sign("server", alternatives="IP:127.0.0.1")), Path(authority.cert))
    path = write_configuration(
        tmp_path / "conf", port=port, host="127.0.0.1", tls=tls, user=getpass.getuser()
    )
    start_mosquitto(configuration=path, port=port)
    mqtt = f"mqtts://127.0.0.1:{port}"
    reach = {
        name: Reach(ca_file=authority.cert, cert=pair.cert, key=pair.key)
        for name, pair in ((name, authority.sign(name)) for name in ("aggregator", "kitchen"))
    }
    serving = begin(
        aggregate, word_artifact, mqtt=mqtt, job=Job("home", rounds=1, clients=1), work=WORK,
        out=tmp_path / "run", reach=reach["aggregator"],
    )  # fmt: skip
    with pytest.raises(TransportError, match="the name in its certificate must be its id, 'hall'"):
        run_device(word_artifact, word_file, mqtt, tmp_path / "hall", id="hall", reach=reach["kitchen"])
    report = run_device(
        word_artifact, word_file, mqtt, tmp_path / "state", id="kitchen", reach=reach["kitchen"]
    )
    assert (report.rounds, serving.result(60).rounds) == (1, 1)
