"""What a round costs the aggregator alone, in CPU seconds, from ten devices to ten thousand: no network, no disk, no training.

``machine`` is the state machine with a store in memory; ``service`` is all of the aggregator over a connection that goes nowhere:
every message is encoded and decoded, and every update of 16 parameters pulled in one chunk, checked and added.
"""

import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.rounds.actions import Action, Assign, Close, Enrol
from fleetune.broker.rounds.federation import Federation
from fleetune.broker.service.service import Service
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.broker.tasks import Task
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.fields import CHUNK_BYTES
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import (
    Hello,
    Offer,
    Request,
    UpdateReady,
    decode,
    device_topic,
    encode,
)

SIZES, ROUNDS, REPEATS = (10, 100, 1_000, 10_000), 2, 3
JOB, ARTIFACT = "bench", "a" * 64
ADAPTER = {"w": np.zeros(16, np.float32)}
PAYLOAD = encode_update("fp32", {"w": np.ones(16, np.float32)}, ADAPTER)
OUTGOING = Outgoing(PAYLOAD)


def measure(say: Callable[[str], None], *, repeats: int = REPEATS) -> dict[str, Any]:
    """One row per number of devices, each the best of ``repeats``; ``…_exponent``: growth from the second size to the last."""
    rows: list[dict[str, Any]] = []
    for size in SIZES:
        row = {
            "devices": size,
            "machine_s": _best(_machine, size, repeats),
            "service_s": _best(_service, size, repeats),
        }
        say(", ".join(f"{name} {value:.4g}" for name, value in row.items()))
        rows.append(row)
    exponents = {f"{what}_exponent": _exponent(rows, f"{what}_s") for what in ("machine", "service")}
    return {"benchmark": "rounds", "rounds": ROUNDS, "repeats": repeats, "cases": rows, **exponents}


def _best(run: Callable[[int], float], size: int, repeats: int) -> float:
    return min(run(size) for _ in range(repeats)) / ROUNDS


def _exponent(rows: list[dict[str, Any]], name: str) -> float:
    first, last = rows[1], rows[-1]
    return round(math.log(last[name] / first[name]) / math.log(last["devices"] / first["devices"]), 3)


def _settings(size: int) -> Settings:
    return Settings(job=JOB, artifact=ARTIFACT, rounds=ROUNDS, clients=size, min_clients=size)


def hello_of(number: int) -> Hello:
    """What a device says when it comes."""
    return Hello(device_id=f"device-{number}", artifact=ARTIFACT, num_samples=5)


def update_of(task: Task | Offer, device_id: str) -> UpdateReady:
    """The announcement that answers a task."""
    return UpdateReady(
        device_id=device_id,
        job=JOB,
        task_id=task.task_id,
        round=task.round,
        version=task.version,
        codec=task.work.codec,
        num_samples=5,
        payload=OUTGOING.manifest,
        stats={"loss": 1.0},
    )


def _machine(size: int) -> float:
    """CPU seconds of all rounds of a job, hellos included."""
    started = time.process_time()
    store = MemoryStore()
    store.add_version(0, b"", round_number=0)
    machine = Federation(_settings(size), Patience(), now=0.0)
    todo: deque[Action] = deque()
    for number in range(size):
        todo.extend(machine.hello(hello_of(number), 0.0))
    while todo:
        match todo.popleft():
            case Enrol(tasks):
                store.enrol(tasks)
            case Close(round=number, version=version):
                store.add_version(version, b"", round_number=number)
            case Assign(task):
                update = update_of(task, task.device_id)
                machine.judge(update)
                store.accept(update, PAYLOAD)
                todo.extend(machine.accepted(update, 1.0))
                machine.tick(1.0)
    assert machine.finished, "the job must be over"
    return time.process_time() - started


class _Nowhere:
    """A connection whose other end answers offers and requests at once, as so many devices would."""

    chunk_bytes, connected, connections = CHUNK_BYTES, True, 1
    bytes_sent = bytes_received = bytes_taken = messages_sent = messages_acknowledged = dropped = 0

    def __init__(self) -> None:
        self.answers: deque[tuple[str, bytes]] = deque()

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Queue what the device says to it."""
        if retain:
            return
        device_id, message = topic.split("/")[-2], decode(payload)
        if isinstance(message, Offer):
            self.say(device_id, encode(update_of(message, device_id)))
        elif isinstance(message, Request):
            for chunk in OUTGOING.chunks(message):
                self.say(device_id, encode(chunk))

    def is_unread(self, topic: str) -> bool:
        """Say no."""
        return False

    def receive(self, timeout_s: float) -> tuple[str, bytes] | None:
        """Next answer."""
        return self.answers.popleft() if self.answers else None

    def say(self, device_id: str, payload: bytes) -> None:
        """Queue a message of a device."""
        self.answers.append((device_topic(JOB, device_id, "up"), payload))


def _service(size: int) -> float:
    """CPU seconds of all rounds of a job, hellos and the devices' encoding included."""
    started = time.process_time()
    link, patience = _Nowhere(), Patience()
    service = Service(
        link, MemoryStore(), _settings(size), patience=patience, adapter=ADAPTER, session="s", now=0.0
    )
    for number in range(size):
        link.say(f"device-{number}", encode(hello_of(number)))
    while message := link.receive(0.0):
        service.take(*message, 1.0)
        service.tick(1.0)
    assert service.finished, "the job must be over"
    return time.process_time() - started
