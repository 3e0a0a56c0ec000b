"""A federation of pretended devices in one process: real agents, service, ledger and outboxes over a loopback.

The clock is pretended: it stands while anyone has something to do, and jumps to the next time that anyone has.
"""

from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_seed
from fleetune.broker.methods.strategies import STRATEGIES
from fleetune.broker.methods.strategy import Gathered, Update
from fleetune.broker.service.outbound import unsigned
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.memory_store import MemoryStore
from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import load_arrays, save_arrays, to_bytes
from fleetune.device_runtime.contracts.wire import decode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.files import DiskFiles, MemoryFiles
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.signing import Signer
from fleetune.device_runtime.network.turns import Turns
from fleetune.device_runtime.terms.contract import Contract

JOB = "job"
ARTIFACT = "a" * 64
STEPS = 4
FOUR = (0, 1, 2, 3)


class Step(NamedTuple):
    loss: float
    active_layers: int = 1
    seconds: float = 0.0


class LinearTraining:
    """Least squares on the device's own points, in numpy; ``seed`` picks the order, as a real trainer's does."""

    def __init__(self, points, work, adapter):
        self.points, self.work, self.adapter = points, work, adapter
        self.step_index, self.history, self.stats = 0, [], {}
        self.effective_samples = float("inf")

    @property
    def done(self):
        return self.step_index >= self.work.steps

    def step(self):
        x, y = self.points
        i = np.random.default_rng([self.work.seed, self.step_index]).integers(len(x))
        error = x[i] @ self.adapter["w"] + self.adapter["b"] - y[i]
        lr = np.float32(self.work.optimizer.lr)
        self.adapter = {
            **self.adapter,
            "w": (self.adapter["w"] - lr * error * x[i]).astype(np.float32),
            "b": np.asarray(self.adapter["b"] - lr * error, np.float32),
        }
        self.step_index += 1
        self.history.append(Step(float(error**2)))
        return self.history[-1]

    def save(self, path):
        save_arrays(
            path, {**self.adapter, "step": np.array(self.step_index), "seed": np.array(self.work.seed)}
        )

    def restore(self, path):
        arrays = load_arrays(path)
        if arrays.pop("seed") != self.work.seed:
            raise ConfigError("a checkpoint of other work")
        self.step_index = int(arrays.pop("step"))
        self.adapter = arrays
        self.history = [Step(0.0)] * self.step_index


class Measure(NamedTuple):
    loss: float
    accuracy: float
    num_samples: int


def first_adapter(size=3000):
    rng = np.random.default_rng(1)
    return {
        "w": rng.standard_normal(size).astype(np.float32),
        "b": np.array(0.5, np.float32),
        "never_trained": np.ones((2, 3), np.float32),
    }


def points_of(number, size=3000):
    rng = np.random.default_rng([7, number])
    return rng.standard_normal((5 + number, size)).astype(np.float32) / 50, rng.standard_normal(5 + number)


def workbench_of(number, *, made=None, size=3000, wrap=None):
    points = points_of(number, size)

    def start(work, adapter):
        if made is not None:
            made.append(work)
        training = LinearTraining(points, work, adapter)
        return wrap(training) if wrap else training

    def evaluate(work, adapter):
        x, y = points
        loss = float(np.mean((x @ adapter["w"] + adapter["b"] - y) ** 2))
        return Measure(loss, 1 / (1 + loss), len(y))

    return Workbench(start, evaluate, len(points[0]))


class Device:
    """A device that can be killed (its memory is gone, what it keeps stays) and started again.

    It keeps its things in ``folder``, or without one in memory.
    """

    def __init__(self, server: Loopback, folder: Path | None, number: int, **options):
        self.name = options.pop("name", f"device-{number}")
        self.identity = Identity(
            self.name,
            JOB,
            options.pop("artifact", ARTIFACT),
            options.pop("role", "train"),
            options.pop("session", ""),
        )
        self.folder, self.server, self.number = folder and folder / self.name, server, number
        self.size = options.pop("size", 3000)
        self.workbench = options.pop("workbench", None) or workbench_of(number, size=self.size)
        self.adapter = options.pop("adapter", None) or FirstAdapter.of(first_adapter(self.size))
        self.gate = options.pop("gate", None)
        self.terms, self.clocks = options.pop("terms", None), options.pop("clocks", {})
        self.options = {"checkpoint_every": 2, **options}
        self.events = []
        self.agent = self.turns = None
        self.files = DiskFiles(self.folder) if folder else MemoryFiles()
        self.outbox = None if folder else MemoryOutbox()

    def start(self):
        if self.folder:
            self.outbox = OutboxFile(self.folder / "outbox.sqlite")
        self.link = self.server.connect(self.identity.topics, will=self.identity.will)
        home = Home(
            self.link,
            self.outbox,
            self.files,
            self.identity,
            self.adapter,
            on_event=self.events.append,
            contract=self.terms and Contract(self.terms, facts=self.outbox, files=self.files, **self.clocks),
            **self.options,
        )
        self.agent = Agent(home, self.workbench, gate=self.gate)
        if self.turns:
            self.turns.join(self.link, self.agent)
        return self

    def kill(self):
        if self.turns:
            self.turns.leave(self.link)
        self.link.kill()
        if self.folder:
            self.outbox.close()
        self.agent = None

    def kinds(self):
        return [event.kind for event in self.events if event.kind != "step"]


def settings_of(**changes):
    work = LocalWork(steps=STEPS, codec=changes.pop("codec", "fp32"))
    fields = {"job": JOB, "artifact": ARTIFACT, "rounds": 3, "clients": 4, "min_clients": 4, "work": work}
    return Settings(**{**fields, **changes})


class Aggregator:
    """An aggregator that can be killed and started again from its ledger."""

    def __init__(
        self,
        server: Loopback,
        folder: Path,
        *,
        size=3000,
        patience=None,
        adapter=None,
        in_memory=False,
        on_note=None,
        key=None,
        **changes,
    ):
        self.on_note, self.key = on_note, key
        self.server, self.folder = server, folder / "aggregator"
        self.settings, self.patience, self.size = settings_of(**changes), patience or Patience(), size
        self.adapter = first_adapter(size) if adapter is None else adapter
        self.rows, self.starts = [], 0
        self.memory = MemoryStore() if in_memory else None
        self.service = self.turns = None

    def start(self, now=0.0):
        self.starts += 1
        session = f"session-{self.starts}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.folder, self.settings) if self.memory is None else self.memory
        seal = Signer(self.key, start=self.ledger.begin()).seal if self.key else unsigned
        self.link = self.server.connect(topics(JOB), will=will(JOB, session, seal=seal))
        self.service = Service(
            self.link,
            self.ledger,
            self.settings,
            patience=self.patience,
            adapter=self.adapter,
            session=session,
            now=now,
            on_row=self.rows.append,
            on_note=self.on_note,
            seal=seal,
        )
        if self.turns:
            self.turns.join(self.link, self)
        return self

    def kill(self):
        if self.turns:
            self.turns.leave(self.link)
        self.link.kill()
        if self.memory is None:
            self.ledger.close()
        self.service = None

    def poll(self, now):
        while (message := self.link.receive(0)) is not None:
            self.service.take(*message, now, has_more=bool(self.link.inbox))
        self.service.tick(now)

    def due_at(self, now):
        return self.service.due_at(now)

    def version(self, number):
        return self.ledger.version(number)


class World:
    """Whoever has something to do takes turns, in an order that ``seed`` shuffles, under one pretended clock."""

    def __init__(self, server, aggregator, devices, *, seed=0):
        self.server, self.aggregator, self.devices = server, aggregator, list(devices)
        rng = np.random.default_rng(seed)
        self.turns = Turns(server, order=lambda links: [links[i] for i in rng.permutation(len(links))])
        self.turns.join(aggregator.link, aggregator)
        for device in self.devices:
            self.turns.join(device.link, device.agent)
        for member in (aggregator, *self.devices):
            member.turns = self.turns

    @property
    def now(self):
        return self.turns.now

    def turn(self):
        self.turns.turn()

    def die_together(self, *turns):
        """After so many turns each time, the aggregator and a device are killed, and start again."""
        for count in turns:
            for _ in range(count):
                self.turn()
            self.aggregator.kill()
            self.devices[1].kill()
            self.aggregator.start(self.now)
            self.devices[1].start()

    def run_killed_at(self, kills):
        """Run to the end; the aggregator is killed, and starts again, before each of these turns."""
        turns = 0

        def is_over():
            nonlocal turns
            turns += 1
            if turns in kills:
                self.aggregator.kill()
                self.aggregator.start(self.now)
            return self.aggregator.service.finished

        return self.run(until=is_over)

    def run(self, *, until=None, turns=4000):
        until = until or (lambda: self.aggregator.service and self.aggregator.service.finished)
        for _ in range(turns):
            if until():
                return self
            self.turn()
        raise AssertionError(f"nothing after {turns} turns: {[d.kinds()[-3:] for d in self.devices]}")


def roughly(seed):
    """A server that loses, doubles and damages messages, a twelfth each; statuses come through."""
    rng = np.random.default_rng(seed)

    def disturb(topic, payload):
        if topic.endswith("status"):
            return (payload,)
        fate = rng.integers(12)
        damaged = payload[:-1] + bytes([payload[-1] ^ 1])
        return {0: (), 1: (payload, payload), 2: (damaged,)}.get(int(fate), (payload,))

    return disturb


def world(folder, *, numbers=FOUR, disturb=None, seed=0, evaluate=False, trusted=None, **changes):
    """A job and its devices, which may trust keys, ready to take turns."""
    server = Loopback(disturb=disturb)
    changes = {"clients": len(numbers), "min_clients": len(numbers), **changes}
    aggregator = Aggregator(server, folder, **changes).start()
    devices = [Device(server, folder, n, trusted=trusted).start() for n in numbers]
    if evaluate:
        devices.append(Device(server, folder, 9, name="eval", role="evaluate", trusted=trusted).start())
    return World(server, aggregator, devices, seed=seed)


def in_process(numbers, *, rounds, settings, size=3000, drop=(), weights=None):
    """The same rounds computed directly: no wire, no codec, no order.

    ``drop`` = (round, number) that took no part; ``weights`` of devices that do not count by their samples.
    """
    adapter, strategy = first_adapter(size), STRATEGIES[settings.strategy]()
    state = {}
    for number in range(1, rounds + 1):
        sums, updates = strategy.init(adapter), []
        for position, device in enumerate(numbers):
            if (number, device) in drop:
                continue
            seed = device_seed(settings.seed, round_number=number, position=position)
            work = LocalWork(steps=settings.work.steps, optimizer=settings.work.optimizer, seed=seed)
            training = LinearTraining(
                points_of(device, size), work, {n: v.copy() for n, v in adapter.items()}
            )
            while not training.done:
                training.step()
            values = {
                n: v.astype(np.float64)
                for n, v in training.adapter.items()
                if v.tobytes() != adapter[n].tobytes()
            }
            weight = (weights or {}).get(device, len(training.points[0]))
            updates.append(Update(values, adapter, weight, device_id=f"device-{device}"))
            sums = strategy.add(sums, updates[-1])
        if strategy.choose:
            adapter = strategy.choose(
                Gathered((), partial(iter, updates), adapter, number, settings.outliers)
            )
        else:
            adapter, state = strategy.finish(sums, adapter, state)
    return to_bytes(adapter)


def spoken(log, kind):
    """Messages of one type among (topic, payload) pairs."""
    found = [(topic, decode(payload)) for topic, payload in log]
    return [(topic, message) for topic, message in found if isinstance(message, kind)]
