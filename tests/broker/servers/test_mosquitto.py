"""The configuration for operators, in a real Mosquitto: logins, a device's own topics only, both listeners."""

import getpass
import subprocess

import pytest
from servers import free_port

from fleetune.broker.servers.mosquitto import Tls, write_configuration
from fleetune.device_runtime.contracts.wire import aggregator_topic, device_topic
from fleetune.device_runtime.errors import ConfigError, TransportError
from fleetune.device_runtime.network.link import Link, Will

UP_A, UP_B, DOWN_A = (
    device_topic("job", *which) for which in (("dev-a", "up"), ("dev-b", "up"), ("dev-a", "down"))
)


@pytest.fixture
def passwords(tmp_path):
    path = tmp_path / "passwords"
    path.touch(mode=0o600)
    for name in ("aggregator", "dev-a", "dev-b"):
        command = ["mosquitto_passwd", "-b", str(path), name, f"secret of {name}"]
        subprocess.run(command, check=True, capture_output=True)
    return path


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


def test_a_device_reaches_its_own_topics_and_no_others(server, caplog):
    everything = login(server, "aggregator", ["fleetune/v1/job/device/+/up"])
    with everything, login(server, "dev-a", [DOWN_A]) as a, login(server, "dev-b", ["fleetune/v1/#"]) as b:
        a.publish(UP_B, b"forged")
        a.publish(aggregator_topic("job"), b"forged", retain=True)
        a.publish(UP_A, b"from a")
        b.publish(UP_B, b"from b")
        heard = sorted(everything.receive(10) for _ in range(2))
        assert heard == [(UP_A, b"from a"), (UP_B, b"from b")]
        everything.publish(DOWN_A, b"to a")
        everything.publish(aggregator_topic("job"), b"status", retain=True)
        assert a.receive(10) == (DOWN_A, b"to a")
        assert [b.receive(10), b.receive(10)] == [(UP_B, b"from b"), (aggregator_topic("job"), b"status")]
        assert (b.receive(0.1), everything.receive(0)) == (None, None)  # b listened to everything
    assert "refuses a message of dev-a: Not authorized" in caplog.text


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
