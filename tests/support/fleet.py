"""A federation of pretended devices in one process: real agents, service, ledger and outboxes over a loopback."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetune.broker.job import Patience, Settings
from fleetune.broker.ledger import Ledger
from fleetune.broker.service import Service, topics, will
from fleetune.broker.strategies import STRATEGIES
from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import Outbox
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import load_arrays, save_arrays, to_bytes
from fleetune.device_runtime.contracts.wire import LocalWork, decode
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.network.loopback import Loopback

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
        self.step_index, self.history = 0, []

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
    """A device that can be killed (its memory is gone, its folder stays) and started again."""

    def __init__(self, server: Loopback, folder: Path, number: int, **options):
        self.name = options.pop("name", f"device-{number}")
        self.identity = Identity(
            self.name, JOB, options.pop("artifact", ARTIFACT), options.pop("role", "train")
        )
        self.folder, self.server, self.number = folder / self.name, server, number
        self.size = options.pop("size", 3000)
        self.workbench = options.pop("workbench", None) or workbench_of(number, size=self.size)
        self.options = options
        self.events = []
        self.agent = None

    def start(self):
        self.folder.mkdir(parents=True, exist_ok=True)
        self.outbox = Outbox(self.folder / "outbox.sqlite")
        self.link = self.server.connect(self.identity.topics, will=self.identity.will)
        self.agent = Agent(
            self.link,
            self.outbox,
            self.workbench,
            identity=self.identity,
            folder=self.folder,
            adapter=first_adapter(self.size),
            on_event=self.events.append,
            **{"checkpoint_every": 2, **self.options},
        )
        return self

    def kill(self):
        self.link.kill()
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

    def __init__(self, server: Loopback, folder: Path, *, size=3000, patience=None, **changes):
        self.server, self.folder = server, folder / "aggregator"
        self.settings, self.patience, self.size = settings_of(**changes), patience or Patience(), size
        self.rows, self.starts = [], 0
        self.service = None

    def start(self, now=0.0):
        self.starts += 1
        session = f"session-{self.starts}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.ledger = Ledger(self.folder, self.settings)
        self.link = self.server.connect(topics(JOB), will=will(JOB, session))
        self.service = Service(
            self.link,
            self.ledger,
            self.settings,
            patience=self.patience,
            adapter=first_adapter(self.size),
            session=session,
            now=now,
            on_row=self.rows.append,
        )
        return self

    def kill(self):
        self.link.kill()
        self.ledger.close()
        self.service = None

    def poll(self, now):
        while (message := self.link.receive(0)) is not None:
            self.service.take(*message, now)
        self.service.tick(now)

    def version(self, number):
        return self.ledger.version(number)


class World:
    """Everyone takes turns, in an order that ``rng`` shuffles, under one pretended clock."""

    def __init__(self, server, aggregator, devices, *, seed=0):
        self.server, self.aggregator, self.devices = server, aggregator, list(devices)
        self.rng, self.now = np.random.default_rng(seed), 0.0

    def turn(self):
        self.now += 0.5
        if self.aggregator.service:
            self.aggregator.poll(self.now)
        for i in self.rng.permutation(len(self.devices)):
            device = self.devices[i]
            if device.agent and not device.agent.finished:
                device.agent.poll(self.now)

    def run(self, *, until=None, turns=4000):
        until = until or (lambda: self.aggregator.service and self.aggregator.service.finished)
        for _ in range(turns):
            if until():
                return self
            self.turn()
        raise AssertionError(f"nothing after {turns} turns: {[d.kinds()[-3:] for d in self.devices]}")


def world(folder, *, numbers=FOUR, disturb=None, seed=0, evaluate=False, **changes):
    """A job and its devices, ready to take turns."""
    server = Loopback(disturb=disturb)
    changes = {"clients": len(numbers), "min_clients": len(numbers), **changes}
    aggregator = Aggregator(server, folder, **changes).start()
    devices = [Device(server, folder, n).start() for n in numbers]
    if evaluate:
        devices.append(Device(server, folder, 9, name="eval", role="evaluate").start())
    return World(server, aggregator, devices, seed=seed)


def in_process(numbers, *, rounds, settings, size=3000, drop=()):
    """The same rounds computed directly: no wire, no codec, no order; ``drop`` = (round, number) that took no part."""
    adapter, strategy = first_adapter(size), STRATEGIES[settings.strategy]()
    state = {}
    for number in range(1, rounds + 1):
        sums = strategy.init(adapter)
        for position, device in enumerate(numbers):
            if (number, device) in drop:
                continue
            seed = settings.seed + (number - 1) * 2**20 + position
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
            sums = strategy.add(sums, values, len(training.points[0]))
        adapter, state = strategy.finish(sums, adapter, state)
    return to_bytes(adapter)


def spoken(log, kind):
    """Messages of one type among (topic, payload) pairs."""
    found = [(topic, decode(payload)) for topic, payload in log]
    return [(topic, message) for topic, message in found if isinstance(message, kind)]
