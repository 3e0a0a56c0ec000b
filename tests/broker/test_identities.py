"""Enrolled devices and a real Mosquitto that `fleetune broker --configure --authority` configured: who gets in, and where."""

import getpass
import os
import re
import signal
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path

import pytest
from background import begin
from certificates import Authority
from enrolled import Fleet
from flat import FEW_SAMPLES
from waiting import until

from fleetune.broker.aggregation import aggregate
from fleetune.broker.authority.authority import aggregator, init, revoke, sign
from fleetune.broker.jobs.settings import Job
from fleetune.broker.servers.listeners import Tls
from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.device_runtime.agent.identity import Duty
from fleetune.device_runtime.commands.device import device
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.wire import aggregator_topic, device_topic
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network import standing
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.link import Link

DOWN, UP, STATUS = (device_topic("home", "kitchen", leaf) for leaf in ("down", "up", "status"))


@pytest.fixture
def fleet(tmp_path, start_mosquitto):
    return Fleet(tmp_path, start_mosquitto, jobs=["home"], log_packets=True)


def link_of(fleet, reach, *, topics=(), name="any", url=""):
    return Link.reaching(url or fleet.url, reach, client_id=name, topics=topics)


def heard_by(link):
    """Wait for the link's end, which is raised; it is to hear nothing."""
    for _ in range(30):
        assert link.receive(1.0) is None, "it heard what is not its own"


def run_device(fleet, artifact, data, name, reach, *, state=None):
    return device(
        artifact, data=data, mqtt=fleet.url, job="home", id=name, state=state or fleet.folder / f"state-{name}",
        duty=Duty(idle_limit_s=60.0), resources=Resources(threads=1), reach=reach,
        terms=FEW_SAMPLES,
    )  # fmt: skip


def serve(fleet, artifact, out, *, rounds=2, clients=2, job="home"):
    return aggregate(
        artifact, mqtt=fleet.aggregator_url, job=Job(job, rounds=rounds, clients=clients),
        work=LocalWork(steps=2, batch_size=4, codec="int8"), out=out, reach=fleet.aggregator,
    )  # fmt: skip


def test_a_federation_of_enrolled_devices(fleet, word_artifact, word_file, tmp_path, caplog):
    serving = begin(serve, fleet, word_artifact, tmp_path / "run")
    devices = [
        begin(run_device, fleet, word_artifact, word_file, name, fleet.device(name))
        for name in ("kitchen", "hall")
    ]
    assert serving.result(60).rounds == 2
    assert [task.result(60).rounds for task in devices] == [2, 2]
    assert "Denied" not in fleet.server.log, "the access list lets everything through that is needed"
    said = caplog.text + fleet.server.log + (tmp_path / "run" / "run.json").read_text()
    for key in fleet.folder.glob("*/*.key"):
        assert key.read_text().splitlines()[1] not in said


@pytest.mark.parametrize("who", ["nobody", "stranger", "server"])
def test_who_has_no_certificate_of_a_device_is_told_and_logged(fleet, tmp_path, who):
    reach = Reach(ca_file=str(fleet.authority / "ca.crt"))
    said = "it asks for a client certificate: give --cert and --key"
    if who == "stranger":
        cert, key = Authority(tmp_path / "strange", "fleetune devices").sign("kitchen")
        reach = Reach(ca_file=reach.ca_file, cert=cert, key=key)
        said = "does not take the client certificate of --cert: .*unknown ca"
    if who == "server":
        own = fleet.authority
        reach = Reach(ca_file=reach.ca_file, cert=str(own / "server.crt"), key=str(own / "server.key"))
        said = "does not take the client certificate of --cert: .*unsupported certificate"
    with pytest.raises(TransportError, match=said):
        link_of(fleet, reach).open(30)
    assert re.search(
        "(New|Client) connection from 127.0.0.1", fleet.server.log
    )  # before its handshake failed, or after
    assert "SSL routines::" in fleet.server.log
    assert "New client connected" not in fleet.server.log


def test_neither_listener_takes_who_belongs_to_the_other(fleet):
    kitchen = fleet.device("kitchen")
    for reach, url in ((kitchen, fleet.aggregator_url), (fleet.aggregator, fleet.url)):
        with pytest.raises(TransportError, match=r"does not take the client certificate of --cert: .*unknown ca"):  # fmt: skip
            link_of(fleet, reach, url=url, name="fleetune-aggregator-home").open(30)


def test_a_devices_certificate_is_no_servers(fleet, tmp_path, start_mosquitto):
    """Who steals a device cannot pose as the server to others."""
    kitchen = fleet.device("kitchen")
    false = start_mosquitto("allow_anonymous true", f"certfile {kitchen.cert}", f"keyfile {kitchen.key}")
    with pytest.raises(TransportError, match=r"its certificate is not trusted: .*purpose"):
        link_of(fleet, kitchen, url=f"mqtts://127.0.0.1:{false.port}").open(30)


def test_a_device_reaches_no_other_devices_topics_and_no_other_job(fleet):
    kitchen, hall = fleet.device("kitchen"), fleet.device("hall")
    everything = link_of(fleet, fleet.aggregator, url=fleet.aggregator_url, topics=["fleetune/v1/#"])
    foreign = [
        (UP, False), (STATUS, True), (DOWN, False), (aggregator_topic("home"), True),
        (device_topic("work", "hall", "up"), True), (device_topic("home", "hall", "down"), True),
        (device_topic("home", "hall", "more"), True),
    ]  # fmt: skip
    with everything, link_of(fleet, kitchen, topics=[DOWN]) as own:
        for topic, retain in foreign:
            with link_of(fleet, hall, topics=["fleetune/v1/#"]) as thief:
                everything.publish(DOWN, b"for kitchen alone")
                thief.publish(topic, b"forged", retain=retain)
                with pytest.raises(TransportError, match="refuses a message of any: Not authorized"):
                    heard_by(thief)
            assert own.receive(10) == (DOWN, b"for kitchen alone")
            assert everything.receive(10) == (DOWN, b"for kitchen alone")
            assert f"Denied PUBLISH from hall (d0, q1, r{retain:d}" in fleet.server.log
            assert f"'{topic}'" in fleet.server.log
        assert everything.receive(0) is None


def test_no_device_throws_another_client_off_the_server(fleet):
    kitchen, hall = fleet.device("kitchen"), fleet.device("hall")
    with (
        link_of(fleet, fleet.aggregator, url=fleet.aggregator_url, name="fleetune-aggregator-home") as first,
        link_of(fleet, kitchen, name="fleetune-home-kitchen") as second,
    ):
        for name in ("fleetune-aggregator-home", "fleetune-home-kitchen", "kitchen", "aggregator"):
            with link_of(fleet, hall, name=name) as thief:
                thief.publish(device_topic("home", "hall", "up"), b"x")
                assert thief.flush(10)
        assert (first.connections, second.connections) == (1, 1)
        assert first.connected
        assert second.connected


def test_a_device_that_is_revoked_stays_out_and_says_why(fleet, monkeypatch, caplog):
    """SIGHUP has Mosquitto read the list again, for who connects; who is in stays in until the server starts again."""
    kitchen, hall = fleet.device("kitchen"), fleet.device("hall")
    monkeypatch.setattr(standing, "_REFUSED_S", 0.5)
    said = r"does not take the client certificate of --cert: .*revoked; its authority has taken it back"
    with link_of(fleet, kitchen, topics=[DOWN]) as link, link_of(fleet, hall) as other:
        revoke(fleet.authority, name="kitchen")
        with link_of(fleet, kitchen, topics=[DOWN]):
            pass  # the server has not read the list yet
        other_connections = other.connections
        fleet.configure()
        fleet.server.signal(signal.SIGHUP)
        until(lambda: "Reloading config" in fleet.server.log)
        with pytest.raises(TransportError, match=said):
            link_of(fleet, kitchen).open(30)
        assert (other.connected, other.connections) == (True, other_connections)
        fleet.server.stop()
        fleet.server.start()
        with pytest.raises(TransportError, match=f"refuses client 'any' without a user name: it {said}"):
            heard_by(link)
        assert "certificate verify failed" in fleet.server.log
        with link_of(fleet, fleet.device("bath")):
            pass


def test_an_aggregator_that_is_revoked_stays_out_until_it_has_another_key(fleet):
    link_of(fleet, fleet.aggregator, url=fleet.aggregator_url).open(30)
    revoke(fleet.authority, name="aggregator")
    fleet.configure()
    fleet.server.stop()
    fleet.server.start()
    with pytest.raises(TransportError, match="revoked"):
        link_of(fleet, fleet.aggregator, url=fleet.aggregator_url).open(30)
    aggregator(fleet.authority)
    with link_of(fleet, fleet.aggregator, url=fleet.aggregator_url):
        pass


def test_a_renewed_certificate_is_taken_and_so_is_the_one_before(fleet, tmp_path):
    before = fleet.device("kitchen")
    request = Path(before.cert).with_suffix(".csr")
    renewed = sign(fleet.authority, request=request, days=1, renew=True, out=tmp_path / "renewed")
    after = Reach(ca_file=before.ca_file, cert=str(Path(renewed.folder) / "kitchen.crt"), key=before.key)
    for reach in (before, after):
        with link_of(fleet, reach, topics=[DOWN]):
            pass


def test_of_two_devices_with_one_certificate_one_stops_and_says_why(
    fleet, word_artifact, word_file, tmp_path
):
    """The server knows both by the certificate's name, and whoever looks for the other throws it off."""
    reach = fleet.device("kitchen")

    def live(name):
        try:
            return run_device(fleet, word_artifact, word_file, "kitchen", reach, state=tmp_path / name).rounds
        except TransportError as exc:
            return str(exc)

    devices = [begin(live, name) for name in ("a", "b")]
    done, _ = wait(devices, 60, FIRST_COMPLETED)
    (stopped,) = done
    assert "another device named 'kitchen' uses this id; give each its own --id" in stopped.result()
    report = serve(fleet, word_artifact, tmp_path / "run", clients=1)
    (other,) = [task for task in devices if task is not stopped]
    assert (report.rounds, other.result(60)) == (2, 2)


def test_of_two_aggregators_with_one_certificate_the_second_is_refused(
    fleet, word_artifact, word_file, tmp_path
):
    serving = begin(serve, fleet, word_artifact, tmp_path / "a", clients=1)
    until(lambda: "'fleetune/v1/home/aggregator/status', ... " in fleet.server.log)
    with pytest.raises(ConfigError, match="another aggregator of job 'home' is at work"):
        serve(fleet, word_artifact, tmp_path / "b", clients=1)
    assert run_device(fleet, word_artifact, word_file, "kitchen", fleet.device("kitchen")).rounds == 2
    assert serving.result(60).rounds == 2


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning"
)  # paho drops a socket that was reset
def test_more_connections_than_allowed_are_hung_up_on_and_the_aggregator_is_let_in(tmp_path, start_mosquitto):
    fleet = Fleet(tmp_path, start_mosquitto, max_connections=1)
    with link_of(fleet, fleet.device("kitchen"), topics=[DOWN]):
        with pytest.raises(TransportError):
            link_of(fleet, fleet.device("hall")).open(1)
        with link_of(fleet, fleet.aggregator, url=fleet.aggregator_url):
            pass


def test_an_authority_of_ones_own_does_the_same(tmp_path, start_mosquitto):
    """Certificates made by openssl: --client-ca, --aggregator-ca and --revoked name what the authority would bring."""
    devices, operators = Authority(tmp_path / "ca"), Authority(tmp_path / "op", "operators")
    tls = Tls(
        *map(Path, devices.sign("server", alternatives="IP:127.0.0.1")),
        client_ca=Path(devices.cert),
        aggregator_ca=Path(operators.cert),
    )
    path = write_configuration(
        tmp_path / "conf", port=(port := 18_000 + os.getpid() % 2000), host="127.0.0.1", tls=tls, user=getpass.getuser()
    )  # fmt: skip
    start_mosquitto(configuration=path, port=port)
    for authority, name, at in ((devices, "kitchen", port), (operators, "aggregator", port + 1)):
        cert, key = authority.sign(name)
        with Link(f"mqtts://127.0.0.1:{at}", client_id="x", topics=[], ca_file=devices.cert, cert=cert, key=key):  # fmt: skip
            pass


def test_what_does_not_go_together_is_told(tmp_path):
    folder = init(tmp_path / "authority")
    with pytest.raises(ConfigError, match="no certificate of the server yet; fleetune authority server"):
        write_configuration(tmp_path / "conf", authority=folder)
    folder = init(tmp_path / "whole", hosts=["server"])
    for options, said in (
        ({"websockets_port": 443}, "Mosquitto's WebSockets know no list of revoked certificates"),
        ({"password_file": folder / "ca.crt"}, "an authority brings certificates and logins of its own"),
        ({"aggregator_port": 8883}, "port 8883 is used twice"),
        ({"port": 65535}, "port 65536: expected 1 to 65535"),
        ({"max_connections": 0}, "--max-connections 0: expected 1 or more"),
        ({"jobs": ["a/#"]}, "job 'a/#': use 1 to 64 letters"),
    ):
        with pytest.raises(ConfigError, match=said):
            write_configuration(tmp_path / "conf", authority=folder, **options)
    with pytest.raises(ConfigError, match="no authority here; fleetune authority init"):
        write_configuration(tmp_path / "conf", authority=tmp_path)
    with pytest.raises(ConfigError, match="--aggregator-port needs the aggregator's own authority"):
        write_configuration(tmp_path / "conf", aggregator_port=1)
    assert not (tmp_path / "conf").exists()
