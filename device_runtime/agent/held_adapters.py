"""The adapters that a device has at hand, and the one that an offer means, made from what was sent."""

import logging
from hashlib import sha256

from fleetune.device_runtime.agent.home import FirstAdapter
from fleetune.device_runtime.agent.state_folder import StateFolder, parse_adapter
from fleetune.device_runtime.arrays import Arrays, to_bytes
from fleetune.device_runtime.contracts.codecs import Codec, make_codec, update_bytes_max
from fleetune.device_runtime.contracts.deltas import apply_delta
from fleetune.device_runtime.contracts.thresholds import blank_thresholds
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.contracts.work import FULL
from fleetune.device_runtime.errors import WireError

log = logging.getLogger(__name__)

_SLACK_BYTES = 64 * 1024


class HeldAdapters:
    """The artifact's own adapter, and the one worked from last."""

    def __init__(self, state: StateFolder, original: FirstAdapter) -> None:
        """Prepare; ``original`` is version 0."""
        self._state, self._original = state, original
        newest = state.newest_adapter()
        self._filed_sha256 = sha256(newest).hexdigest() if newest else ""
        """Of the file in the folder; what another is asked for need not be looked for there."""
        is_ours = _fits(newest, original.arrays)  # that of a job with another artifact may lie there
        self._newest_sha256 = self._filed_sha256 if is_ours else original.digest
        self._wants_whole = False

    @property
    def reference(self) -> str:
        """SHA-256 of the adapter file that differences may be taken from; empty if they have failed before."""
        return "" if self._wants_whole else self._newest_sha256

    @property
    def other_reference(self) -> str:
        """The artifact's own, where ``reference`` is another; empty if there is nothing to be said of it."""
        return "" if self.reference in ("", self._original.digest) else self._original.digest

    def find(self, digest: str) -> bytes | None:
        """Adapter file with this SHA-256, if it is at hand."""
        if digest == self._original.digest:
            return self._original.content
        if digest == self._filed_sha256:
            if (filed := self._state.adapter(digest)) is not None:
                return filed
            self._filed_sha256 = ""  # damaged since, or gone
        return self._first_of_thresholds(digest)

    def _first_of_thresholds(self, digest: str) -> bytes | None:
        """Version 0 of a job of thresholds, if that is meant: it is made here as well as there."""
        if not (blank := blank_thresholds(self._original.arrays)):
            return None
        content = to_bytes({**self._original.arrays, **blank})
        return content if sha256(content).hexdigest() == digest else None

    def lacks_reference(self, offer: Offer) -> bool:
        """Whether an offer's adapter is a difference from one that is not here, or not trusted to be the same."""
        return bool(offer.reference) and (self._wants_whole or self.find(offer.reference) is None)

    def keep(self, content: bytes, digest: str) -> None:
        """Keep what is worked from, and has this SHA-256; StateError if it cannot be written."""
        self._newest_sha256 = digest
        if content is not self._original.content and digest != self._filed_sha256:
            self._filed_sha256 = ""  # until it is written
            self._state.keep_adapter(content)
            self._filed_sha256 = digest

    def arrays(self, content: bytes) -> Arrays:
        """Tensors of an adapter file, float32 by name; WireError if they are not this artifact's."""
        original = self._original
        return original.arrays if content is original.content else parse_adapter(content, original.arrays)

    def size_bytes_max(self, offer: Offer) -> int:
        """Largest size of what is sent with an offer; ConfigError for an unknown codec."""
        if offer.down_codec == FULL:
            return len(self._original.content) + _SLACK_BYTES
        arrays = self._original.arrays
        return update_bytes_max(_codec_of(offer), {**arrays, **blank_thresholds(arrays)})

    def open(self, offer: Offer, payload: bytes, *, known: str = "") -> bytes | None:
        """Make the adapter file that an offer means from what was sent; None if only the whole will do from now on.

        Args:
            offer: what it was sent with.
            payload: what was sent, without a mask.
            known: its SHA-256, where somebody has looked; else it is looked at here.

        Raises:
            WireError: what was sent whole is not what the offer means.
        """
        wanted = wanted_sha256(offer)
        if offer.down_codec == FULL:
            if (known or sha256(payload).hexdigest()) != wanted:
                raise WireError(f"adapter: SHA-256 of what was sent is not {wanted[:64]!r}")
            return payload
        try:
            content = self._applied(offer, payload)
            if sha256(content).hexdigest() == wanted:
                return content
            reason: object = "it decodes to another adapter than the aggregator's"
        except WireError as exc:
            reason = exc
        log.warning("version %d: asking for the whole adapter: %s", offer.version, reason)
        self._wants_whole = True
        return None

    def _applied(self, offer: Offer, payload: bytes) -> bytes:
        held = self.find(offer.reference)
        if held is None:
            raise WireError(f"adapter {offer.reference[:12]!r} is not held any more")
        return apply_delta(_codec_of(offer), payload, self.arrays(held))


def _fits(content: bytes, like: Arrays) -> bool:
    try:
        return bool(parse_adapter(content, like))
    except WireError:
        return False


def wanted_sha256(offer: Offer) -> str:
    """SHA-256 of the adapter file that an offer is to be worked from."""
    return offer.adapter_sha256 or offer.adapter.sha256


def _codec_of(offer: Offer) -> Codec:
    return make_codec(offer.down_codec, offer.down_ratio, offer.down_bits)
