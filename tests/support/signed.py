"""Keys for tests, the same in every run, and an aggregator that signs what it says by hand."""

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fleet import JOB
from stage import NAME, Prompter, Stage

from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    Chunk,
    aggregator_topic,
    device_topic,
    encode,
)
from fleetune.device_runtime.network.signing import Signer, Trusted

KEY, NEXT_KEY, STRANGERS = (Ed25519PrivateKey.from_private_bytes(bytes([n]) * 32) for n in (1, 2, 3))
DOWN = device_topic(JOB, NAME, "down")


def trusting(*keys):
    return Trusted([key.public_key() for key in keys or (KEY,)])


class Signatory(Prompter):
    """Signs as one start of an aggregator; ``said`` has each message as it went out, by topic."""

    def __init__(self, server, *, key=KEY, start=1):
        super().__init__(server)
        self.signer, self.said = Signer(key, start=start), []

    def restart(self, start, *, key=KEY):
        self.signer = Signer(key, start=start)

    def say(self, message, *, topic=DOWN, retain=False):
        payload = encode(message)
        if not isinstance(message, Chunk):
            payload = self.signer.seal(topic, payload)
        self.said.append((topic, payload))
        self.link.publish(topic, payload, retain=retain)

    def status(self, session="one", **changes):
        fields = {"job": JOB, "session": session, "online": True, "round": 1, "version": 0, **changes}
        self.say(AggregatorStatus(**fields), topic=aggregator_topic(JOB), retain=True)

    def again(self, topic, payload):
        """Say what was recorded."""
        self.link.publish(topic, payload)


class SignedStage(Stage):
    """A device that trusts KEY, its aggregator that has it, and a stranger who may write to every topic."""

    def __init__(self, tmp_path, *, trusted=None, **options):
        super().__init__(tmp_path, trusted=trusted or trusting(), **options)
        self.stranger, self.aggregator = self.aggregator, Signatory(self.server)
