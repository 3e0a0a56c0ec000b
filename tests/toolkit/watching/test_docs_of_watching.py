"""What docs/operate.md says of watching holds: the access list lets somebody watch and no more, the board's figures are there."""

import json
import re
import time
from urllib.request import Request, urlopen

import pytest
from fleetune_metrics import samples_of
from paths import ROOT
from servers import password_file

from fleetune.broker.servers.access import access_list
from fleetune.device_runtime.contracts.scores import SCORES
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    DeviceStatus,
    RoundFigures,
    View,
    aggregator_topic,
    device_topic,
    encode,
)
from fleetune.device_runtime.errors import TransportError
from fleetune.device_runtime.network.address import Reach
from fleetune.device_runtime.network.link import Link
from fleetune.toolkit.pages import answering
from fleetune.toolkit.watching.fleet import Fleet
from fleetune.toolkit.watching.listener import Listener
from fleetune.toolkit.watching.server import make_server

PAGE = (ROOT / "docs/operate.md").read_text()


def test_a_login_of_its_own_may_watch_and_nothing_else(start_mosquitto, tmp_path):
    block = re.search(r"```\n(user watcher\n.*?)```", PAGE, re.DOTALL).group(1)
    passwords = password_file(tmp_path, aggregator="a", watcher="w")
    (tmp_path / "acl").write_text(access_list(passwords, "aggregator") + "\n" + block)
    lines = ("allow_anonymous false", f"password_file {passwords}", f"acl_file {tmp_path / 'acl'}")
    url = start_mosquitto(*lines).url
    as_watcher = url.replace("://", "://watcher:w@")
    with Link(
        url.replace("://", "://aggregator:a@"), client_id="a", topics=[aggregator_topic("home", "look")]
    ) as ours:
        status = AggregatorStatus(job="home", session="s", online=True, round=1, version=0)
        ours.publish(aggregator_topic("home"), encode(status), retain=True)
        seen = DeviceStatus(device_id="kitchen", online=True)
        ours.publish(device_topic("home", "kitchen", "status"), encode(seen), retain=True)
        listener = Listener(as_watcher, "home", Reach())
        listener.open()
        until = time.monotonic() + 20
        while not (listener.state().devices and listener.state().job.aggregator == "here"):
            assert time.monotonic() < until
            listener.turn(0.05)
        assert ours.receive(10)[0] == aggregator_topic("home", "look")
        listener.close()
        with Link(as_watcher, client_id="b", topics=[]) as theirs:
            theirs.publish(device_topic("home", "kitchen", "down"), b"x")
            theirs.flush(5)
            with pytest.raises(TransportError, match="ot authorized"):
                theirs.receive(5)


def expressions(board):
    """Each expression of the board, with the labels that its legend names."""
    for panel in board["panels"]:
        for target in panel["targets"]:
            yield target["expr"], set(re.findall(r"{{(\w+)}}", target["legendFormat"]))


def measured_fleet():
    """A fleet of which everything is known."""
    fleet = Fleet("home")
    work = {"phase": "training", "round": 1, "step": 1, "steps": 2, "step_s": 0.5}
    vitals = {"memory_mb": 9.0, "temperature_c": 50.0}
    measured = {"loss": 1.0, "train_loss": 1.0} | dict.fromkeys(SCORES, 0.5)
    view = View(job="home", session="s", round=1, num_rounds=2, version=1, is_open=True,
                figures=[RoundFigures(round=1, devices=1, measured=measured)])  # fmt: skip
    status = AggregatorStatus(job="home", session="s", online=True, round=1, version=1)
    device = DeviceStatus(device_id="kitchen", online=True, software="1", **work, **vitals)
    for topic, message in (
        (aggregator_topic("home"), status),
        (aggregator_topic("home", "view"), view),
        (device_topic("home", "kitchen", "status"), device),
    ):
        fleet.take(topic, encode(message), 0.0)
    return fleet.state(0.0)


def test_every_figure_of_the_board_is_served_with_the_labels_that_it_asks_for():
    """Over HTTP, as Prometheus scrapes it: no Grafana is here to be asked."""
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    server = make_server("127.0.0.1", 0, token="a-token-of-the-board", state=measured_fleet)
    with answering(server):
        request = Request(f"http://127.0.0.1:{server.server_address[1]}/metrics")
        request.add_header("Authorization", "Bearer a-token-of-the-board")
        with urlopen(request, timeout=10) as answer:
            served = samples_of(answer.read().decode())
    labels = {name: {label for label, _ in pairs} for name, pairs in served}
    wanted = [("fleetune_round", {"job"})]  # of the list of jobs
    assert board["templating"]["list"][0]["query"] == "label_values(fleetune_round, job)"
    for expression, legend in expressions(board):
        selectors = re.findall(r"(fleetune_\w+){([^}]*)}", expression)
        assert len(selectors) == expression.count("fleetune_")
        wanted += [(name, legend | set(re.findall(r"(\w+)=", asked))) for name, asked in selectors]
    assert all(asked <= labels[name] for name, asked in wanted)
    unseen = {name for name in labels if name not in dict(wanted)}
    assert unseen == {"fleetune_device_round", "fleetune_round_seconds", "fleetune_version"}
    sources = {json.dumps(panel["datasource"], sort_keys=True) for panel in board["panels"]}
    assert sources == {json.dumps({"type": "prometheus", "uid": "${DS_PROMETHEUS}"}, sort_keys=True)}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
