"""The mask that a device has at hand: the newest that came with an offer, known by its digest."""

from hashlib import sha256

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.masks import Mask, mask_bytes, read_mask
from fleetune.device_runtime.contracts.wire import Offer
from fleetune.device_runtime.errors import WireError
from fleetune.device_runtime.files import Files

_FILE = "mask.bin"


class HeldMask:
    """One file; that of another job, or a damaged one, has another digest than is asked for."""

    def __init__(self, files: Files, like: Arrays) -> None:
        """Prepare; ``like`` are the adapter's tensors."""
        self._files, self._like = files, like

    @property
    def digest(self) -> str:
        """SHA-256 of the mask that is here; empty for none."""
        content = self._files.read(_FILE)
        return sha256(content).hexdigest() if content else ""

    def lacks(self, offer: Offer) -> bool:
        """Whether the mask of an offer is not here."""
        return bool(offer.mask_sha256) and offer.mask_sha256 != self.digest

    def size_bytes(self, offer: Offer) -> int:
        """Length of the mask that comes with an offer's adapter; WireError if it cannot be."""
        if offer.mask_bytes not in (0, mask_bytes(self._like)):
            raise WireError(f"mask of {offer.mask_bytes} bytes; this adapter's has {mask_bytes(self._like)}")
        return offer.mask_bytes

    def parted(self, offer: Offer, payload: bytes) -> bytes:
        """Keep the mask at the end of what was sent, and return what is before it; WireError if it is not the offer's."""
        size = self.size_bytes(offer)
        content, mask = payload[: len(payload) - size], payload[len(payload) - size :]
        if size:
            if sha256(mask).hexdigest() != offer.mask_sha256:
                raise WireError(f"mask: SHA-256 of what was sent is not {offer.mask_sha256[:64]!r}")
            self._files.write(_FILE, mask)
        return content

    def of(self, offer: Offer) -> Mask:
        """The mask that an offer's update is cut to, empty for none; WireError if it is not this adapter's."""
        return read_mask(self._files.read(_FILE) or b"", self._like) if offer.mask_sha256 else {}
