"""What a device does in a round beside the engine's work, timed: a real agent takes rounds from a real service.

It fetches and checks the version, makes its batches, keeps the optimizer, packs the update and hands it over. Disk is left out.
"""

import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Job
from fleetune.broker.laws import lawful_settings
from fleetune.broker.service.service import Service, topics, will
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.turns import Turns
from fleetune.device_runtime.training.machine import Machine
from fleetune.toolkit.simulation.costs import Point
from fleetune.toolkit.simulation.members import Aggregator

_JOB, _ROUNDS, _STEPS = "overhead", 6, (1, 9)
_SAMPLES = 200


def time_rounds(artifact: Artifact, dataset: Dataset, *, batch_size: int) -> list[Point]:
    """Measure processor seconds of a round beside the engine's, at two numbers of steps."""
    few = dataset.subset(np.arange(min(_SAMPLES, dataset.num_samples)))
    with tempfile.TemporaryDirectory(prefix="fleetune-timing-") as name:
        folder = Path(name)
        with Machine(artifact, Resources(threads=1), folder=folder) as machine:
            machine.engine = engine = _TimedEngine(machine.engine)
            workbench = Workbench(
                lambda work, adapter: machine.trainer(few, work, adapter),
                lambda _, adapter: machine.evaluate(few, adapter),
                few.num_samples,
            )
            works = [LocalWork(steps=steps, batch_size=batch_size) for steps in _STEPS]
            return [
                Point(
                    work.steps,
                    _federate(artifact, work, folder / f"{work.steps}", workbench, lambda: engine.seconds),
                )
                for work in works
            ]


class _TimedEngine:
    """An engine that knows how long it worked."""

    def __init__(self, engine: Engine) -> None:
        self.seconds = 0.0
        self._engine = engine

    def step(self, *args: Any, **options: Any) -> Any:
        """As of the engine."""
        start = time.process_time()
        try:
            return self._engine.step(*args, **options)
        finally:
            self.seconds += time.process_time() - start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


class _TimedAgent:
    """An agent that knows how long its turns took."""

    def __init__(self, agent: Agent) -> None:
        self.seconds = 0.0
        self._agent = agent

    def poll(self, now: float) -> object:
        """As of the agent."""
        start = time.process_time()
        try:
            return self._agent.poll(now)
        finally:
            self.seconds += time.process_time() - start

    def due_at(self, now: float) -> float:
        """As of the agent."""
        return self._agent.due_at(now)


def _federate(
    artifact: Artifact, work: LocalWork, folder: Path, workbench: Workbench, engine_s: Callable[[], float]
) -> float:
    """Seconds of a round, the first one left out."""
    settings = lawful_settings(artifact, Job(_JOB, rounds=_ROUNDS, clients=1), work=work, patience=Patience())
    server, identity = Loopback(), Identity("device", _JOB, artifact.digest)
    turns, adapter = Turns(server), artifact.adapter()
    with closing(Ledger(folder, settings)) as ledger:
        link = server.connect(topics(_JOB), will=will(_JOB, "overhead"))
        service = Service(
            link, ledger, settings, patience=Patience(), adapter=adapter, session="overhead", now=0.0
        )
        turns.join(link, Aggregator(link, service))
        own = server.connect(identity.topics, will=identity.will)
        home = Home(own, MemoryOutbox(), MemoryFiles(), identity, FirstAdapter.of(adapter))
        agent = _TimedAgent(Agent(home, workbench))
        turns.join(own, agent)
        turns.run(lambda: ledger.newest >= 1)
        before = agent.seconds - engine_s()
        turns.run(lambda: service.finished)
        return max(agent.seconds - engine_s() - before, 1e-9) / (_ROUNDS - 1)
