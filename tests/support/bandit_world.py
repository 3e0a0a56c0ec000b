"""A fleet without training: arms with gain curves that saturate, devices with speeds, measurements with noise; plain numpy.

The model's quality q grows in a round by the mean over the devices of rate * (ceiling - q) of their arms. A device measures
that on its own held-out part, plus what it gains by its data alone (``local``), plus noise. A round takes as long as its slowest
device.
"""

from functools import cache
from typing import NamedTuple

import numpy as np

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.arms import arm_of, units
from fleetune.broker.methods.choosing import Candidate
from fleetune.broker.tasks import Outcome
from fleetune.device_runtime.contracts.work import LocalWork

ARTIFACT = "a" * 64


class Curve(NamedTuple):
    rate: float
    ceiling: float


class Ended(NamedTuple):
    quality: float
    seconds: float
    chosen: list
    """One dict a round: arm by device."""


class World:
    """``curve(policy, kept)`` is an arm's, ``kept`` the share of the layers that train."""

    def __init__(self, curve, *, speeds, rounds=40, num_layers=12, noise=0.02, local=0.05, seed=0):
        self.curve, self.speeds, self.rounds, self.num_layers = curve, speeds, rounds, num_layers
        self.noise, self.local, self.seed = noise, local, seed
        self.arm = cache(lambda policy: arm_of(policy, num_layers))

    def settings(self, **changes):
        fields = {"job": "j", "artifact": ARTIFACT, "rounds": self.rounds, "clients": len(self.speeds)}
        fields |= {"min_clients": 1, "num_layers": self.num_layers, "configurator": "auto", "seed": self.seed}
        return Settings(**{**fields, "work": LocalWork(steps=20, held_out=0.1), **changes})

    def cost(self, policy, below=0):
        return units(self.arm(policy), 1.0, below=below)

    def gain(self, policy, q):
        back = self.arm(policy).back / self.num_layers
        rate, ceiling = self.curve(policy, back)
        return rate * max(ceiling - q, 0.0)

    def under(self, configurator, *, lie=None, declines=None, **changes):
        """Run a whole job; ``lie(device, stats)`` says what a device tells, ``declines(device, policy)`` why it will not."""
        settings = self.settings(**changes)
        rng = np.random.default_rng([self.seed, 9])
        own = rng.normal(0, self.local, len(self.speeds))
        state, q, seconds, chosen = configurator.init(settings), 0.0, 0.0, []
        for number in range(1, self.rounds + 1):
            asked = {}
            for i in range(len(self.speeds)):
                choice = configurator.choose(state, Candidate(f"d{i}", number, i))
                if choice.work is not None:
                    asked[i] = choice
            told, took = [], []
            for i, choice in asked.items():
                policy = choice.work.policy
                cause = declines(i, policy) if declines else None
                if cause is not None:
                    state = configurator.learn(state, Outcome(f"d{i}", choice.work, {}, cause))
                    continue
                gain, time = (
                    self.gain(policy, q),
                    self.speeds[i] * self.cost(policy, max(choice.work.cache_below, 0)),
                )
                time *= choice.work.steps / settings.work.steps
                after = 2.0 - q - gain - self.local - own[i] / 2 + rng.normal(0, self.noise)
                stats = {"held_loss_before": 2.0 - q + own[i], "held_loss_after": after + own[i]}
                stats |= {"seconds": time * (1 + rng.normal(0, 0.03))}
                told.append(gain)
                took.append(time)
                stats = lie(i, stats) if lie else stats
                state = configurator.learn(state, Outcome(f"d{i}", choice.work, stats))
            q += float(np.mean(told)) if told else 0.0
            seconds += max(took, default=0.0)
            chosen.append({i: choice.work.policy for i, choice in asked.items()})
        return Ended(q, seconds, chosen)

    def always(self, policy):
        """Every device at one arm."""
        q = 0.0
        for _ in range(self.rounds):
            q += self.gain(policy, q)
        return Ended(q, self.rounds * max(self.speeds) * self.cost(policy), [])
