"""A pretended model of three layers and a head, of which a device keeps the layers that a test says."""

import numpy as np
from fleet import Measure, Step
from stage import Stage

from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.trainer_port import Workbench
from fleetune.device_runtime.arrays import load_arrays, save_arrays
from fleetune.device_runtime.contracts.wire import Request, UpdateReady
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError

__all__ = ["LayeredStage", "bench_of", "first", "moved", "name_of", "trained", "work_of"]
SIZE, STEPS = 400, 3


def name_of(layer):
    return f"layer{layer}.a"


def first():
    """Version 0; equal at every call."""
    rng = np.random.default_rng(4)
    names = [*map(name_of, range(3)), "head"]
    return {name: rng.standard_normal(SIZE).astype(np.float32) for name in names}


def moved(adapter, by):
    return {name: (value + np.float32(by)).astype(np.float32) for name, value in adapter.items()}


def work_of(number, *, personal=1, **changes):
    return LocalWork(**{"steps": STEPS, "seed": number, "personal": personal, **changes})


class Layered:
    """Adds to every tensor what the seed and the step draw; ``kept`` says for a seed which layers stay, ``idle`` which rest."""

    def __init__(self, work, adapter, *, kept, idle=(), held_out=None):
        self.stats, self.effective_samples = {}, float("inf")
        self.measure = held_out or (lambda adapter: None)
        self.work, self.adapter, self.start = work, adapter, dict(adapter)
        self.history, self._kept, self._idle = [], kept(work.seed), {name_of(i) for i in idle}

    @property
    def step_index(self):
        return len(self.history)

    @property
    def done(self):
        return self.step_index >= self.work.steps

    @property
    def personal(self):
        return {name_of(layer) for layer in self._kept}

    def step(self):
        rng = np.random.default_rng([self.work.seed, self.step_index])
        by = {n: rng.standard_normal(SIZE).astype(np.float32) / 8 for n in sorted(self.adapter)}
        self.adapter = {n: v if n in self._idle else v + by[n] for n, v in self.adapter.items()}
        self.history.append(Step(1.0))
        return self.history[-1]

    def save(self, path):
        start = {f"start/{name}": value for name, value in self.start.items()}
        save_arrays(path, {**self.adapter, **start, "step": np.array(self.step_index)})

    def restore(self, path):
        found = load_arrays(path)
        if any(found.pop(f"start/{n}").tobytes() != v.tobytes() for n, v in self.start.items()):
            raise ConfigError("a checkpoint of another start")
        self.history = [Step(1.0)] * int(found.pop("step"))
        self.adapter = found


def bench_of(kept, starts, *, num_samples, idle=(), held_out=None):
    """A workbench; what each run starts from is added to ``starts``, with its work."""

    def start(work, adapter):
        starts.append((work, {n: np.array(v) for n, v in adapter.items()}))
        return Layered(work, adapter, kept=kept, idle=idle, held_out=held_out)

    return Workbench(start, lambda work, adapter: Measure(1.0, 0.5, num_samples), num_samples)


def trained(work, start):
    """What a run makes of ``start``."""
    run = Layered(work, dict(start), kept=lambda seed: ())
    while not run.done:
        run.step()
    return run.adapter


class LayeredStage(Stage):
    """A device of that model and its aggregator; gathers what runs started from, and the models of its owner."""

    def __init__(self, tmp_path, *, kept, idle=(), held_out=None, **options):
        self.starts, self.own = [], []
        bench = bench_of(
            lambda seed: kept.get(seed, ()), self.starts, idle=idle, num_samples=9, held_out=held_out
        )
        bench = bench._replace(keep=self.own.append)
        super().__init__(tmp_path, workbench=bench, adapter=FirstAdapter.of(first()), **options)

    def round(self, number, adapter, **changes):
        """Train a round to its announcement; its update."""
        self.offer(number, adapter, **changes)
        for _ in range(50):
            for update in self.served():
                return update
        raise AssertionError(self.device.kinds())

    def offer(self, number, adapter, **changes):
        changes = {"work": work_of(number), **changes}
        self.aggregator.offer(number, adapter=adapter, version=number - 1, **changes)

    def served(self):
        """Poll once, give what the device asks for, and return the updates that it announces."""
        self.poll()
        heard = self.aggregator.heard(Request, UpdateReady)
        for request in (message for message in heard if isinstance(message, Request)):
            for chunk in self.aggregator.outgoing.chunks(request):
                self.aggregator.say(chunk)
        return [message for message in heard if isinstance(message, UpdateReady)]

    def settled(self, number, adapter, *, accepted=True, **changes):
        """The same, pulled and answered; its payload."""
        update = self.round(number, adapter, **changes)
        payload = self.pull(update)
        self.aggregator.verdict(update, accepted=accepted)
        self.poll(2)
        return payload

    def restart(self):
        self.device.kill()
        self.device.start()
