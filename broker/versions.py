"""The adapter's versions: the newest, what the open round adds to it, and those ready to be served."""

import logging
from collections.abc import Iterator

from safetensors.numpy import load

from fleetune.broker.job import Settings
from fleetune.broker.ledger import Ledger
from fleetune.broker.strategies import STRATEGIES
from fleetune.device_runtime.arrays import Arrays, to_bytes
from fleetune.device_runtime.contracts.codecs import decode_update, update_bytes_max
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Chunk, Request, TransferManifest
from fleetune.device_runtime.errors import WireError

log = logging.getLogger(__name__)

_SHELF = 3
"""Versions ready to be served at once; evaluating devices may be some behind."""


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
        self._ledger, self._codec = ledger, settings.work.codec
        self._strategy = STRATEGIES[settings.strategy]()
        self._reference: Arrays = load(ledger.version(newest))
        self._sums = self._strategy.init(self._reference)
        self._shelf: dict[int, Outgoing] = {}
        self._fold(newest + 1)

    @property
    def update_bytes_max(self) -> int:
        """Largest payload that an update can have."""
        return update_bytes_max(self._codec, self._reference)

    def add(self, content: bytes, num_samples: int) -> None:
        """Add the payload of an update to the open round; WireError if it is malformed or implausible: it is left out."""
        values = decode_update(content, self._reference, codec=self._codec)
        self._sums = self._strategy.add(self._sums, values, num_samples)

    def close(self, round_number: int) -> None:
        """Combine the updates of the open round into version ``round_number``."""
        memory = self._ledger.memory(round_number - 1)
        new, kept = self._strategy.finish(self._sums, self._reference, load(memory) if memory else {})
        self._ledger.add_version(round_number, to_bytes(new), memory=to_bytes(kept) if kept else b"")
        self._reference, self._sums = new, self._strategy.init(new)

    def offer(self, version: int, *, chunk_bytes: int) -> TransferManifest:
        """Have a version ready to be served, in chunks of this size."""
        found = self._shelf.pop(version, None)
        if found is None or found.manifest.chunk_bytes != chunk_bytes:
            found = Outgoing(self._ledger.version(version), chunk_bytes=chunk_bytes)
        self._shelf[version] = found
        while len(self._shelf) > _SHELF:
            del self._shelf[next(iter(self._shelf))]
        return found.manifest

    def chunks(self, request: Request) -> Iterator[Chunk]:
        """What is asked for; WireError if it is not offered, or as :meth:`Outgoing.chunks`."""
        found = next((o for o in self._shelf.values() if o.manifest.sha256 == request.sha256), None)
        if found is None:
            raise WireError(f"it asks for transfer {request.sha256[:64]!r}, which is not offered")
        return found.chunks(request)

    def _fold(self, round_number: int) -> None:
        """Add what was accepted in an earlier life."""
        for device_id, num_samples, payload in self._ledger.accepted(round_number):
            self.add(payload, num_samples)
            log.info("round %d: the update of %s is at hand", round_number, device_id)
