"""The accounting against Mosquitto's own counters: payload of all PUBLISH packets, exact but for the last goodbyes."""

import json
import sqlite3
import threading
from concurrent.futures import ThreadPoolExecutor

from flat import aggregate, device
from paho.mqtt.client import CallbackAPIVersion, Client

from fleetune.broker import aggregation
from fleetune.device_runtime.contracts.run_file import LEDGER, TRAFFIC

RECEIVED, SENT = (f"$SYS/broker/publish/bytes/{way}" for way in ("received", "sent"))


class Watcher:
    """Reads the server's counters, and knows what the server has sent to it itself."""

    def __init__(self, port):
        self.own = 0
        self.counters, self.changed = {}, threading.Condition()
        self._client = Client(CallbackAPIVersion.VERSION2, client_id="watcher")
        self._client.on_message = self._take
        self._client.connect("127.0.0.1", port)
        self._client.subscribe([(RECEIVED, 0), (SENT, 0)])
        self._client.loop_start()

    def _take(self, client, userdata, message):
        with self.changed:
            # The server counts a message once it has made it: this one is not in its own number.
            of_others = int(message.payload) - (self.own if message.topic == SENT else 0)
            self.counters[message.topic] = of_others
            self.own += len(message.payload)
            self.changed.notify_all()

    def wait_for(self, topic, least, timeout_s=20.0):
        with self.changed:
            self.changed.wait_for(lambda: self.counters.get(topic, 0) >= least, timeout_s)
            return self.counters.get(topic)

    def close(self):
        self._client.disconnect()
        self._client.loop_stop()


def test_every_byte_is_as_the_server_counts(start_mosquitto, word_artifact, word_file, tmp_path, monkeypatch):
    monkeypatch.setattr(aggregation, "_check_alone", lambda *_: None)  # a visitor's bytes are no job's
    server = start_mosquitto("allow_anonymous true", "sys_interval 1")
    watcher, names = Watcher(server.port), ("kitchen", "hall")
    with ThreadPoolExecutor() as pool:
        devices = {
            name: pool.submit(
                device,
                word_artifact,
                data=word_file,
                id=name,
                state=tmp_path / name,
                threads=1,
                mqtt=server.url,
                job="home",
                idle_limit_s=60,
                tell_labels=name == "kitchen",
            )
            for name in names
        }
        report = aggregate(
            word_artifact,
            mqtt=server.url,
            out=tmp_path / "run",
            job="home",
            rounds=3,
            clients=2,
            local_steps=2,
            seq_len=8,
            evaluation_s=5,
            traffic="caesar",
            histogram=True,
        )
        told = {name: done.result(60) for name, done in devices.items()}
    sent = report.link_bytes_sent + sum(one.bytes_sent for one in told.values())
    assert watcher.wait_for(RECEIVED, sent) == sent
    assert total(report.down) == report.link_bytes_sent
    assert total(report.up) == report.link_bytes_received
    lines = [json.loads(line) for line in (tmp_path / "run" / TRAFFIC).read_text().splitlines()]
    assert sum(sum(line["down"].values()) for line in lines) == report.link_bytes_sent
    assert sum(sum(line["up"].values()) for line in lines) == report.link_bytes_received
    assert {line["device"] for line in lines} == {"", *names}
    assert {line["round"] for line in lines} >= {1, 2, 3}
    for name, one in told.items():
        up = sum(sum(line["up"].values()) for line in lines if line["device"] == name)
        unheard = (
            one.bytes_sent - up
        )  # a hello before the aggregator listens, a status when its books are closed
        assert 0 <= unheard < 400
    received = report.link_bytes_received + sum(one.bytes_received for one in told.values())
    statuses = (
        4 * 100
    )  # of three who leave, and the aggregator's to all: after the books of their readers are closed
    assert received <= watcher.wait_for(SENT, received) <= received + statuses
    watcher.close()
    assert report.up.positions > 0
    ((device_id, noted),) = noted_in(tmp_path / "run" / LEDGER)
    assert (device_id, json.loads(noted)["histogram"][3:]) == ("kitchen", [0, 0]), (
        "five classes, three in use"
    )
    assert sum(json.loads(noted)["histogram"]) == 120


def noted_in(path):
    with sqlite3.connect(path) as sql:
        query = "SELECT device, noted FROM updates JOIN tasks USING (task_id) WHERE noted LIKE '%histogram%'"
        found = sql.execute(query).fetchall()
    sql.close()
    return found


def total(by_kind):
    return by_kind.values + by_kind.positions + by_kind.scales + by_kind.protocol
