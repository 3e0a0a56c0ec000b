"""An adapter file as its difference from another: what is sent to a device that holds the other already.

Sender and receiver decode with the same arithmetic, so the sender knows the SHA-256 of what the receiver will have,
also where the codec is lossy.
"""

from collections.abc import Mapping
from typing import NamedTuple

from fleetune.device_runtime.arrays import Array, Arrays, same_bits, to_bytes
from fleetune.device_runtime.contracts.codecs import Codec, pack, unpack
from fleetune.device_runtime.contracts.codecs.codec import floats


class Delta(NamedTuple):
    """A difference, and what it makes of the adapter that it is taken from."""

    payload: bytes
    content: bytes
    """The adapter file that :func:`apply_delta` gives."""


def make_delta(codec: Codec, adapter: Arrays, held: Arrays) -> Delta:
    """Pack what ``adapter`` has in other bits than ``held``; both float32, of the same names and shapes.

    Raises:
        WireError: the codec cannot hold it, or something is not finite.
    """
    changed = {n: v for n, v in adapter.items() if not same_bits(v, held[n])}
    packed = pack(codec, changed, held)
    return Delta(packed.payload, _content(packed.conveyed, held))


def apply_delta(codec: Codec, payload: bytes, held: Arrays) -> bytes:
    """Return the adapter file that :func:`make_delta` packed; WireError if ``payload`` is damaged or of another codec."""
    return _content(unpack(codec, payload, held).values, held)


def _content(values: Mapping[str, Array], held: Arrays) -> bytes:
    return to_bytes({**held, **{name: floats(value) for name, value in values.items()}})
