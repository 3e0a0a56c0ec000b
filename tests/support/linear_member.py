"""A device or aggregator of :mod:`fleet` as a process over a real MQTT server: real agent, service and link, no artifact.

``linear_member.py aggregator URL FOLDER ROUNDS CLIENTS SIZE`` and
``linear_member.py device URL FOLDER NUMBER SIZE`` (number 9 evaluates).
"""

import json
import logging
import math
import secrets
import sys
import time
from collections import Counter
from pathlib import Path

import fleet

from fleetune.broker.jobs.patience import Patience
from fleetune.device_runtime.contracts.wire import Chunk, decode
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.network.link import Link, Will


class Server:
    """What :mod:`fleet` connects to."""

    def __init__(self, url: str, name: str) -> None:
        self.url, self.name = url, name

    def connect(self, topics, *, will=None):
        link = Link(self.url, client_id=self.name, topics=topics, will=Will(*will) if will else None)
        link.open(120)
        return link


def aggregate(url: str, folder: Path, rounds: int, clients: int, size: int) -> dict:
    server = Server(url, "aggregator")
    patience = Patience(deadline_s=0, evaluation_s=300)
    one = fleet.Aggregator(
        server,
        folder,
        rounds=rounds,
        clients=clients,
        min_clients=clients,
        size=size,
        patience=patience,
        down_codec="whole",
    )
    one.start(time.monotonic())
    while not one.service.finished:
        if message := one.link.receive(0.1):
            one.service.take(*message, time.monotonic())
        one.service.tick(time.monotonic())
    one.link.flush(30)
    one.service.stop(time.monotonic())
    one.link.close()
    rows = [(row.round, round(row.seconds, 1), row.loss) for row in one.rows]
    return {"rows": rows, "sent": one.link.bytes_sent, "received": one.link.bytes_received}


def work(url: str, folder: Path, number: int, size: int) -> dict:
    name = f"device-{number}"
    device = fleet.Device(
        Server(url, name),
        folder,
        number,
        size=size,
        role="evaluate" if number == 9 else "train",
        session=secrets.token_hex(8),
    )
    folder.joinpath(name).mkdir(parents=True, exist_ok=True)
    device.start()
    told = Told()
    while not device.agent.finished:
        device.agent.poll(now := time.monotonic())
        wait_s = min(device.agent.due_at(now) - time.monotonic(), 1.0)
        if wait_s > 0 and (message := device.link.receive(0.0 if math.isinf(-wait_s) else wait_s)):
            told.count(message[1])
            device.agent.take(*message, time.monotonic())
    device.link.close()
    found = {"connections": device.link.connections, "received": device.link.bytes_received}
    return {**found, "kinds": dict(told.bytes)}


class Told:
    """Bytes that came by what they are: chunks for the first time, again, what is around their data, and other messages."""

    def __init__(self) -> None:
        self.bytes, self._seen = Counter(), set()

    def count(self, payload: bytes) -> None:
        try:
            message = decode(payload) if payload else None
        except WireError:
            message = None
        if not isinstance(message, Chunk):
            self.bytes[type(message).__name__] += len(payload)
            return
        place = message.sha256, message.index, len(message.data)
        self.bytes["again" if place in self._seen else "once"] += len(message.data)
        self.bytes["around chunks"] += len(payload) - len(message.data)
        self._seen.add(place)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(relativeCreated)d %(message)s")
    kind, url, folder, *numbers = sys.argv[1:]
    print(json.dumps((aggregate if kind == "aggregator" else work)(url, Path(folder), *map(int, numbers))))
