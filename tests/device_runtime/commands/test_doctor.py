"""Each thing that keeps a device from working has a line that names it, and what to do."""

import json
import shutil

import pytest
from pretended import PretendedSystem
from servers import free_port, password_file
from typer.testing import CliRunner

from fleetune.broker.servers.access import access_list
from fleetune.device_runtime.commands.doctor import doctor
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.wire import AggregatorStatus, aggregator_topic, encode
from fleetune.device_runtime.errors import one_line
from fleetune.device_runtime.files import alone_in
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.link import Link
from fleetune.toolkit.cli import app

SOON = Reach(timeout_s=3)


@pytest.fixture
def board(tmp_path):
    """A board of 1 GB with a processor that has instructions for int8, at 50 degrees."""
    system = PretendedSystem(tmp_path / "board")
    system.write("proc/cpuinfo", "Features\t: fp asimd asimddp")
    system.write("proc/meminfo", "MemTotal:  1000000 kB\nMemFree: 1 kB\nMemAvailable:  600000 kB")
    system.zone(50)
    return system


def levels(found):
    return {finding.what: finding.level for finding in found.findings}


def of(found, what):
    return next(finding for finding in found.findings if finding.what == what)


def test_a_healthy_board_is_well(board, word_artifact, tmp_path):
    found = doctor(word_artifact, root=board.root, state=tmp_path / "state")
    assert found.ok
    assert set(levels(found).values()) == {"ok"}
    assert {"processor", "memory", "disk", "clock", "temperature", "artifact"} <= levels(found).keys()
    assert of(found, "processor").said.endswith("int8 by neon-dotprod")
    assert not (tmp_path / "state").exists(), "nothing is changed"


def test_what_a_board_lacks(board, word_artifact, tmp_path):
    board.write("proc/cpuinfo", "Features\t: fp asimd")
    board.write("proc/meminfo", "MemTotal:  90000 kB\nMemAvailable:  30000 kB")
    board.remove("sys/class/thermal")
    board.write("run/systemd/notify", "")
    damaged = tmp_path / "artifact"
    shutil.copytree(word_artifact, damaged)
    (damaged / "manifest.json").write_text("{}")
    found = doctor(damaged, root=board.root, state=tmp_path / "state", data=tmp_path / "none.csv")
    expected = {
        "processor": "warn",
        "memory": "warn",
        "clock": "warn",
        "temperature": "warn",
        "artifact": "fail",
        "data": "fail",
    }
    assert {what: levels(found)[what] for what in expected} == expected
    assert not found.ok
    whole = doctor(word_artifact, root=board.root, state=tmp_path / "state")
    assert "smallest step takes about" in of(whole, "memory").said
    assert of(whole, "memory").level == "fail"
    assert all(one.remedy for one in found.findings if one.level != "ok")
    assert all(str(one) == one_line(str(one), length_max=2000) for one in found.findings)


def test_rules_that_forbid_work_now_and_a_budget_that_is_not_free(board, word_artifact):
    rules = {"root": str(board.root), "temperature": {"max_c": 40}}
    found = doctor(word_artifact, root=board.root, rules=rules, resources=Resources(memory_budget_mb=900))
    assert (of(found, "rules").level, of(found, "memory").level) == ("warn", "warn")
    assert "50.0 C is above 40 C" in of(found, "rules").said
    assert levels(doctor(root=board.root, rules={"temperature": {"max": 1}}))["rules"] == "fail"


def test_a_server_that_lets_a_device_do_all_it_must(board, mosquitto):
    with Link(mosquitto.url, client_id="aggregator", topics=["x"]) as link:
        status = AggregatorStatus(job="home", session="s", online=True, round=4, version=3)
        link.publish(aggregator_topic("home"), encode(status), retain=True)
        link.flush(5)
        found = doctor(root=board.root, mqtt=mosquitto.url, job="home", id="kitchen", reach=SOON)
    network = ("server", "login", "access list", "packet limit", "aggregator")
    assert [levels(found)[what] for what in network] == ["ok"] * 5
    assert of(found, "aggregator").said == "here, round 4"


def test_nobody_is_there(board):
    url = f"mqtt://127.0.0.1:{free_port()}"
    found = doctor(root=board.root, mqtt=url, job="home", reach=SOON)
    assert of(found, "server").level == "fail"
    assert "refused" in of(found, "server").said
    assert "login" not in levels(found)
    assert levels(doctor(root=board.root, mqtt=url))["job"] == "fail"


def test_a_login_an_access_list_and_a_packet_limit_that_do_not_fit(board, start_mosquitto, tmp_path):
    passwords = password_file(tmp_path, aggregator="a", kitchen="k")
    (tmp_path / "acl").write_text(access_list(passwords, "aggregator"))
    lines = ("allow_anonymous false", f"password_file {passwords}", f"acl_file {tmp_path / 'acl'}")
    server = start_mosquitto(*lines, "max_packet_size 20000")

    def seen(login, name):
        url = server.url.replace("://", f"://{login}@")
        found = doctor(root=board.root, mqtt=url, job="home", id=name, reach=SOON)
        return found, levels(found)

    found, told = seen("kitchen:wrong", "kitchen")
    assert told["login"] == "fail"
    assert "wrong" not in str(found)
    found, told = seen("kitchen:k", "hall")
    assert (told["login"], told["access list"]) == ("ok", "fail")
    assert "device/hall/#" in of(found, "access list").remedy
    _, told = seen("kitchen:k", "kitchen")
    assert (told["access list"], told["packet limit"], told["aggregator"]) == ("ok", "warn", "warn")


def test_a_device_that_is_at_work_is_not_thrown_off(board, mosquitto, tmp_path):
    state = tmp_path / "state"
    state.mkdir()
    with alone_in(state, "busy"):
        found = doctor(root=board.root, mqtt=mosquitto.url, job="home", state=state, reach=SOON)
    assert of(found, "server").level == "warn"
    assert "a device is at work" in of(found, "server").said
    assert "client" not in mosquitto.log


def test_the_command_takes_a_devices_file_and_its_exit_code_tells(tmp_path, word_artifact):
    config = tmp_path / "device.toml"
    config.write_text(
        f"[device]\ndata = '{tmp_path / 'none.csv'}'\ntell_progress = false\n[rules]\nperiod_s = 5\n"
    )
    done = CliRunner().invoke(app, ["doctor", str(word_artifact), "--config", str(config), "--json"])
    told = json.loads(done.stdout.splitlines()[-1])
    assert (done.exit_code, told["ok"]) == (1, False)
    assert {one["what"]: one["level"] for one in told["findings"]}["data"] == "fail"
    assert CliRunner().invoke(app, ["doctor", str(word_artifact)]).exit_code == 0
