import copy

import numpy as np
from fleet import ARTIFACT, JOB, Aggregator, first_adapter

from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import (
    Hello,
    Request,
    UpdateReady,
    Verdict,
    aggregator_topic,
    decode,
    device_topic,
    encode,
)
from fleetune.device_runtime.network.loopback import Loopback


class Stranger:
    """Speaks to a service by hand."""

    def __init__(self, tmp_path, name="device-0", **changes):
        self.server = Loopback()
        changes = {"clients": 1, "min_clients": 1, "rounds": 1, **changes}
        self.aggregator = Aggregator(self.server, tmp_path, **changes).start()
        self.name = name
        self.link = self.server.connect([device_topic(JOB, name, "down"), aggregator_topic(JOB)])
        self.now = 1.0

    def beside(self, name):
        """Another at the same service."""
        other = copy.copy(self)
        other.name, other.link = name, self.server.connect([device_topic(JOB, name, "down")])
        return other

    def say(self, message, *, name=None):
        self.say_raw(encode(message), name=name)

    def say_raw(self, payload, *, name=None):
        self.link.publish(device_topic(JOB, name or self.name, "up"), payload)
        self.aggregator.poll(self.now)

    def heard(self, kind):
        messages = []
        while (found := self.link.receive(0)) is not None:
            messages.append(decode(found[1]))
        return [m for m in messages if isinstance(m, kind)]

    def hello(self, **changes):
        self.say(Hello(**{"device_id": self.name, "artifact": ARTIFACT, "num_samples": 5, **changes}))

    def ready(self, payload, **changes):
        manifest = Outgoing(payload).manifest
        fields = {"device_id": self.name, "job": JOB, "round": 1, "version": 0, "codec": "fp32"}
        return UpdateReady(**{**fields, "num_samples": 5, "payload": manifest, **changes})

    def deliver(self, payload, **changes):
        """Announce, serve every request for this payload (garbled announcements cause others), and return the verdicts."""
        self.say(self.ready(payload, **changes))
        outgoing, verdicts = Outgoing(payload), []
        while found := self.heard((Request, Verdict)):
            verdicts += [m for m in found if isinstance(m, Verdict)]
            ours = outgoing.manifest.sha256
            for request in [m for m in found if isinstance(m, Request) and m.sha256 == ours]:
                for chunk in outgoing.chunks(request):
                    self.say(chunk)
        return verdicts


def good_payload():
    adapter = first_adapter()
    return encode_update("fp32", {n: v + np.float32(1) for n, v in adapter.items()}, adapter)
