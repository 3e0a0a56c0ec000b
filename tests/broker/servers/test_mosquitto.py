"""The configuration for operators, in a real Mosquitto: logins, a device's own topics only, both listeners."""

import getpass
import os
import pwd
import tempfile
from pathlib import Path

import pytest
from certificates import Authority
from servers import free_port, password_file

from fleetune.broker.servers.listeners import Tls
from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.device_runtime.contracts.wire import aggregator_topic, device_topic, shared_topic
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.link import Link, Will

UP_A, UP_B, DOWN_A = (
    device_topic("job", *which) for which in (("dev-a", "up"), ("dev-b", "up"), ("dev-a", "down"))
)


@pytest.fixture
def passwords(tmp_path):
    return password_file(tmp_path, **{name: f"secret of {name}" for name in ("aggregator", "dev-a", "dev-b")})


@pytest.fixture
def server(tmp_path, passwords, start_mosquitto):
    port = free_port()
    path = write_configuration(
        tmp_path / "conf", port=port, host="127.0.0.1", password_file=passwords,
        websockets_port=free_port(), user=getpass.getuser(),
    )  # fmt: skip
    return start_mosquitto(configuration=path, port=port)


def login(server, name: str, topics: list[str], **options) -> Link:
    url = f"mqtt://{name}:secret%20of%20{name}@127.0.0.1:{server.port}"
    return Link(url, client_id=name, topics=topics, **options)


def test_a_device_reaches_its_own_topics_and_no_others(server):
    everything = login(server, "aggregator", ["fleetune/v1/job/device/+/up"])
    with everything, login(server, "dev-a", [DOWN_A]) as a, login(server, "dev-b", ["fleetune/v1/#"]) as b:
        a.publish(UP_A, b"from a")
        b.publish(UP_B, b"from b")
        heard = sorted(everything.receive(10) for _ in range(2))
        assert heard == [(UP_A, b"from a"), (UP_B, b"from b")]
        everything.publish(DOWN_A, b"to a")
        everything.publish(aggregator_topic("job"), b"status", retain=True)
        assert a.receive(10) == (DOWN_A, b"to a")
        assert b.receive(10) == (aggregator_topic("job"), b"status")
        assert (b.receive(0.1), everything.receive(0)) == (None, None)  # b listened to everything
        a.publish(UP_B, b"forged")
        b.publish(aggregator_topic("job"), b"forged", retain=True)
        for link, name in ((a, "dev-a"), (b, "dev-b")):
            with pytest.raises(TransportError, match=f"refuses a message of {name}: Not authorized"):
                link.receive(10)
        assert everything.receive(0.1) is None
    with login(server, "dev-a", [aggregator_topic("job")]) as late:
        assert late.receive(10) == (aggregator_topic("job"), b"status"), "not the forged one"
    assert "ACL pattern" not in server.log


def test_all_devices_may_listen_to_what_is_published_once_and_none_may_speak_there(server):
    topic = shared_topic("job", "session-1", 0)
    everything = login(server, "aggregator", [topic])
    with everything, login(server, "dev-a", [DOWN_A]) as a, login(server, "dev-b", []) as b:
        for link in (a, b):
            link.listen(topic)
            assert link.flush(10)
        a.publish(UP_A, b"after SUBSCRIBE")
        assert a.flush(10)
        b.publish(UP_B, b"after SUBSCRIBE")
        assert b.flush(10)
        everything.publish(topic, b"chunk")
        assert [link.receive(10) for link in (a, b)] == [(topic, b"chunk")] * 2
        a.unlisten(topic)
        a.publish(UP_A, b"after UNSUBSCRIBE")
        assert a.flush(10)
        everything.publish(topic, b"chunk")
        everything.publish(DOWN_A, b"more")
        assert a.receive(10) == (DOWN_A, b"more")
        assert b.receive(10) == (topic, b"chunk")
        b.publish(topic, b"forged")
        with pytest.raises(TransportError, match="refuses a message of dev-b: Not authorized"):
            b.receive(10)


def test_a_device_may_have_a_will_of_its_own(server):
    status = device_topic("job", "dev-a", "status")
    with (
        login(server, "aggregator", [device_topic("job", "+", "status")]) as everything,
        login(server, "dev-a", [], will=Will(status, b"gone")) as a,
    ):
        a.publish(status, b"here", retain=True)
        assert everything.receive(10) == (status, b"here")


def test_nobody_enters_without_a_login(server):
    with pytest.raises(TransportError, match="without a user name: Not authorized"):
        Link(server.url, client_id="dev-a", topics=[]).open()


def test_what_is_retained_survives_a_restart(server):
    with login(server, "aggregator", []) as link:
        link.publish(aggregator_topic("job"), b"round 3", retain=True)
    server.stop()
    server.start()
    with login(server, "dev-a", [aggregator_topic("job")]) as link:
        assert link.receive(10) == (aggregator_topic("job"), b"round 3")


def test_without_logins_only_this_machine_is_served(tmp_path):
    text = write_configuration(tmp_path / "made").read_text()
    assert "listener 1883 127.0.0.1\n" in text
    assert "allow_anonymous true" in text
    assert "acl_file" not in text
    assert "user " not in text


def test_tls_goes_to_every_listener(tmp_path):
    for name in ("cert", "key", "ca"):
        (tmp_path / name).touch()
    tls = Tls(tmp_path / "cert", tmp_path / "key", tmp_path / "ca")
    text = write_configuration(
        tmp_path, port=8883, websockets_port=443, tls=tls, persistence=False
    ).read_text()
    assert text.count(f"certfile {tmp_path / 'cert'}") == text.count("require_certificate true") == 2
    assert text.endswith("protocol websockets\n")
    assert "persistence" not in text


def test_everything_wrong_is_listed(tmp_path):
    with pytest.raises(
        ConfigError, match=r"port 0: expected 1 to 65535; .*nowhere: no such file; .*cert: no such file"
    ):
        write_configuration(
            tmp_path,
            port=0,
            password_file=tmp_path / "nowhere",
            tls=Tls(tmp_path / "cert", tmp_path / "cert"),
        )
    with pytest.raises(ConfigError, match="port 1883 is used twice"):
        write_configuration(tmp_path, websockets_port=1883)


def test_the_name_in_a_certificate_is_the_login_where_there_are_no_passwords(tmp_path, start_mosquitto):
    authority, port = Authority(tmp_path / "ca"), free_port()
    tls = Tls(*map(Path, authority.sign("server", alternatives="IP:127.0.0.1")), Path(authority.cert))
    path = write_configuration(
        tmp_path / "conf", port=port, host="127.0.0.1", tls=tls, user=getpass.getuser()
    )
    start_mosquitto(configuration=path, port=port)
    links = {
        name: Link(
            f"mqtts://127.0.0.1:{port}", client_id=name, topics=topics, ca_file=authority.cert, cert=cert, key=key
        )
        for name, topics in (("aggregator", ["fleetune/v1/job/device/+/up"]), ("dev-a", [aggregator_topic("job")]))
        for cert, key in [authority.sign(name)]
    }  # fmt: skip
    with links["aggregator"] as everything, links["dev-a"] as a:
        everything.publish(aggregator_topic("job"), b"status")
        assert a.receive(10) == (aggregator_topic("job"), b"status")
        a.publish(UP_A, b"from a")
        assert everything.receive(10) == (UP_A, b"from a")
        a.publish(UP_B, b"forged")
        with pytest.raises(TransportError, match="Not authorized"):
            a.receive(10)
        assert everything.receive(0.1) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start Mosquitto as another user")
def test_mosquitto_started_by_root_can_write_its_folder_and_what_it_cannot_read_is_told(
    passwords, caplog, start_mosquitto
):
    try:
        mosquitto = pwd.getpwnam("mosquitto")
    except KeyError:
        pytest.skip("no user mosquitto here")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "passwords").write_bytes(passwords.read_bytes())
        (root / "passwords").chmod(0o600)
        port = free_port()
        options = {"port": port, "host": "127.0.0.1", "password_file": root / "passwords"}
        path = write_configuration(root / "conf", **options)
        assert f"chown mosquitto: {root / 'passwords'}" in caplog.text
        os.chown(root / "passwords", mosquitto.pw_uid, mosquitto.pw_gid)
        caplog.clear()
        assert write_configuration(root / "conf", **options) == path
        assert caplog.text == ""
        server = start_mosquitto(configuration=path, port=port)
        with login(server, "aggregator", []) as link:
            link.publish(aggregator_topic("job"), b"round 3", retain=True)
        server.stop()
        assert (root / "conf" / "data" / "mosquitto.db").stat().st_uid == mosquitto.pw_uid
        assert "rror" not in server.log
        assert "arning" not in server.log


def test_an_aggregator_without_a_login_is_told(tmp_path, passwords, caplog):
    write_configuration(tmp_path / "conf", password_file=passwords, aggregator="boss", user=getpass.getuser())
    assert "passwords: no user 'boss', who is the aggregator" in caplog.text
    assert "user aggregator\ntopic read " in (tmp_path / "conf" / "fleetune.acl").read_text()
