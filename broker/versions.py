"""The adapter's versions: the newest, and what the open round adds to it."""

import logging
from collections.abc import Mapping

import numpy as np
from safetensors.numpy import load

from fleetune.broker.downlink import Downlink
from fleetune.broker.job import Settings
from fleetune.broker.ledger import Ledger
from fleetune.broker.strategies import STRATEGIES
from fleetune.device_runtime.arrays import Arrays, to_bytes
from fleetune.device_runtime.contracts.codecs import make_codec, reference_of, unpack, update_bytes_max
from fleetune.device_runtime.contracts.codecs.codec import Doubles

log = logging.getLogger(__name__)


class Versions:
    """Every version is in the ledger; this holds the newest in memory, and the sums that make the next."""

    def __init__(self, ledger: Ledger, settings: Settings, adapter: Arrays) -> None:
        """Begin with ``adapter`` as version 0, float32 by tensor name, or resume with what the ledger holds.

        Raises:
            StateError: the ledger's files are damaged.
        """
        if not ledger.has_version(0):
            ledger.add_version(0, to_bytes(adapter))
        newest = ledger.past().version
        self._ledger = ledger
        self._codec = make_codec(settings.work.codec, settings.work.codec_ratio)
        self.downlink = Downlink(ledger, settings)
        """What devices are sent of them."""
        self._strategy = STRATEGIES[settings.strategy]()
        self._reference: Arrays = load(ledger.version(newest))
        self._sums = self._strategy.init(self._reference)
        self._newest = newest
        self._fold(newest + 1)

    @property
    def update_bytes_max(self) -> int:
        """Largest payload that an update can have."""
        return update_bytes_max(self._codec, self._reference)

    def add(self, content: bytes, num_samples: int) -> None:
        """Add the payload of an update to the open round; WireError if it is malformed or implausible: it is left out."""
        self._sums = self._strategy.add(self._sums, self._decoded(content), num_samples)

    def close(self, round_number: int) -> None:
        """Combine the updates of the open round into version ``round_number``."""
        state = self._ledger.memory(round_number - 1)
        new, kept = self._strategy.finish(self._sums, self._reference, load(state) if state else {})
        self._ledger.add_version(round_number, to_bytes(new), memory=to_bytes(kept) if kept else b"")
        self._reference, self._sums, self._newest = new, self._strategy.init(new), round_number
        self.downlink.close(round_number)

    def _decoded(self, content: bytes) -> Mapping[str, Doubles]:
        """Values of an update; one from a replica moves the version itself as far as it moved the replica."""
        named = reference_of(content)
        if not named:
            return unpack(self._codec, content, self._reference).values
        replica = self.downlink.replica(self._newest, named)
        values = unpack(self._codec, content, replica).values
        return {n: np.float64(self._reference[n]) + (v - np.float64(replica[n])) for n, v in values.items()}

    def _fold(self, round_number: int) -> None:
        """Add what was accepted in an earlier life."""
        for device_id, num_samples, payload in self._ledger.accepted(round_number):
            self.add(payload, num_samples)
            log.info("round %d: the update of %s is at hand", round_number, device_id)
