"""What devices are known to hold: adapter files by their SHA-256, version 0 besides, and masks."""

from itertools import islice


class Holdings:
    """Of one life of an aggregator: devices say it in every hello, and some of it follows from what they send."""

    def __init__(self, original: str) -> None:
        """Know nothing of any device; ``original`` is the SHA-256 of version 0."""
        self.original = original
        self._adapters: dict[str, str] = {}
        self._masks: dict[str, str] = {}
        self._has_original: set[str] = set()
        self._made_of: set[str] = set()

    def makes_original(self, digest: str) -> None:
        """Who says that it holds this adapter can make version 0 of it, and is taken to hold that."""
        self._made_of.add(digest)

    def say(self, device_id: str, adapter: str, mask: str, *, original: str) -> None:
        """A device says which adapter it holds, empty: it wants the whole; which mask; which adapter its artifact brought."""
        adapter, original = (self.original if held in self._made_of else held for held in (adapter, original))
        self.take(device_id, adapter, mask)
        if not adapter:
            self._has_original.discard(device_id)
        elif self.original in (adapter, original):
            self._has_original.add(device_id)

    def take(self, device_id: str, adapter: str, mask: str) -> None:
        """A device holds another adapter and mask now."""
        self._adapters.pop(device_id, None)  # those heard last come last
        self._adapters[device_id], self._masks[device_id] = adapter, mask

    def adapter(self, device_id: str) -> str:
        """SHA-256 of the adapter that a device holds; empty for none."""
        return self._adapters.get(device_id, "")

    def mask(self, device_id: str) -> str:
        """SHA-256 of the mask that a device holds; empty for none."""
        return self._masks.get(device_id, "")

    def has_original(self, device_id: str) -> bool:
        """Whether a device holds version 0, beside another or not."""
        return device_id in self._has_original

    def lately(self, count: int) -> set[str]:
        """What so many devices hold, of those heard last."""
        return set(islice(reversed(self._adapters.values()), count))
