"""What docs/operate.md says of watching holds: the access list lets somebody watch and no more, the board's figures are there."""

import json
import re
import time

import pytest
from fleetune_metrics import samples_of
from paths import ROOT
from servers import password_file

from fleetune.broker.servers.access import access_list
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
from fleetune.toolkit.watching.fleet import Fleet
from fleetune.toolkit.watching.listener import Listener
from fleetune.toolkit.watching.metrics import exposition

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


def test_every_figure_of_the_board_is_served():
    board = json.loads((ROOT / "docs/grafana.json").read_text())
    wanted = {
        name
        for panel in board["panels"]
        for target in panel["targets"]
        for name in re.findall(r"fleetune_\w+", target["expr"])
    }
    fleet = Fleet("home")
    work = {
        "phase": "training",
        "round": 1,
        "step": 1,
        "steps": 2,
        "step_s": 0.5,
        "memory_mb": 9.0,
        "temperature_c": 50.0,
    }
    measured = {"loss": 1.0, "accuracy": 0.5, "train_loss": 1.0}
    view = View(job="home", session="s", round=1, num_rounds=2, version=1, is_open=True,
                figures=[RoundFigures(round=1, devices=1, measured=measured)])  # fmt: skip
    status = AggregatorStatus(job="home", session="s", online=True, round=1, version=1)
    device = DeviceStatus(device_id="kitchen", online=True, software="1", **work)
    for topic, message in (
        (aggregator_topic("home"), status),
        (aggregator_topic("home", "view"), view),
        (device_topic("home", "kitchen", "status"), device),
    ):
        fleet.take(topic, encode(message), 0.0)
    served = {name for name, _ in samples_of(exposition(fleet.state(0.0)))}
    assert wanted <= served
    assert len(wanted) > 15
