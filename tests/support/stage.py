"""A device under a pretended clock, an aggregator that speaks to it by hand, and the weather that its rules mind."""

import numpy as np
from fleet import JOB, STEPS, Device, LinearTraining, first_adapter, points_of

from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.pull import Pull
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    Offer,
    UpdateReady,
    Verdict,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.rules.gate import Gate
from fleetune.device_runtime.rules.rules import Network, Reading, Rules, Temperature

NAME = "device-3"


class Prompter:
    """An aggregator's end of the wire, spoken to one agent by hand."""

    def __init__(self, server):
        self.link = server.connect([device_topic(JOB, NAME, "up"), device_topic(JOB, NAME, "status")])

    def say(self, message):
        self.link.publish(device_topic(JOB, NAME, "down"), encode(message))

    def status(self, session="one", **changes):
        fields = {"job": JOB, "session": session, "online": True, "round": 1, "version": 0, **changes}
        self.link.publish(aggregator_topic(JOB), encode(AggregatorStatus(**fields)), retain=True)

    def heard(self, *kinds):
        messages = []
        while (found := self.link.receive(0)) is not None:
            messages.append(decode(found[1]))
        return [m for m in messages if isinstance(m, kinds or object)]

    def offer(self, number=1, *, adapter=None, **changes):
        self.outgoing = Outgoing(to_bytes(adapter or first_adapter()))
        fields = {"job": JOB, "round": number, "version": number - 1, "role": "train", "deadline_s": 0.0}
        fields |= {"work": LocalWork(steps=STEPS, seed=number), "adapter": self.outgoing.manifest, **changes}
        self.say(Offer(**fields))

    def verdict(self, update, *, accepted=True, reason=""):
        digest = update.payload.sha256 if isinstance(update, UpdateReady) else ""
        self.say(Verdict(job=JOB, round=update.round, digest=digest, accepted=accepted, reason=reason))


class Stage:
    """A device, its aggregator, and a clock."""

    def __init__(self, tmp_path, **options):
        self.server = Loopback()
        self.aggregator = Prompter(self.server)
        self.device = Device(self.server, tmp_path, 3, **options).start()
        self.now = 0.0

    def poll(self, times=1):
        for _ in range(times):
            self.now += 0.01
            self.device.agent.poll(self.now)

    def until(self, kind):
        for _ in range(200):
            self.poll()
            if self.device.kinds()[-1:] == [kind]:
                return
        raise AssertionError(self.device.kinds())

    def trained(self, number=1, **changes):
        self.aggregator.offer(number, **changes)
        self.until("trained")
        self.poll()
        return self.aggregator.heard(UpdateReady)[-1]

    def pull(self, update):
        pull = Pull(update.payload, size_bytes_max=10**6, now=self.now)
        while not pull.done:
            if request := pull.due(self.now):
                self.aggregator.say(request)
            self.poll()
            for chunk in self.aggregator.heard(Chunk):
                pull.add(chunk, self.now)
        return pull.content()


def locally(seed, adapter=None):
    training = LinearTraining(points_of(3), LocalWork(steps=STEPS, seed=seed), adapter or first_adapter())
    while not training.done:
        training.step()
    return training.adapter


def shifted():
    return {name: (value + np.float32(0.25)).astype(np.float32) for name, value in first_adapter().items()}


HOT = Reading(temperature=90.0, network="wired")

FINE = Reading(temperature=50.0, network="wired")

ON_CELLULAR = Reading(temperature=50.0, network="cellular")


class Weather:
    """What the sensors of a pretended system say."""

    def __init__(self):
        self.reading = FINE

    def gate(self):
        rules = Rules(temperature=Temperature(max_c=70), network=Network(), period_s=0, resume_after_s=0)
        return Gate(rules, lambda: self.reading)
