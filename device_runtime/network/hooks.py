"""What a client does for its link, and what it says of the user whose connection it is."""

from collections.abc import Callable
from typing import NamedTuple

from fleetune.device_runtime.network.tls import Context


class Party(NamedTuple):
    """What a client says of its user, who alone knows, when the server refuses or somebody else takes its place."""

    denied: str = ""
    """What to do when the server denies a message or a subscription."""
    taken: str = ""
    """Who else may be connected under the same client id, and what to do."""
    is_other: Callable[[bytes], bool] = lambda _: False
    """Whether a message under the will's topic says that somebody else is online there."""
    is_foreign: Callable[[bytes], bool] = lambda _: False
    """Whether such a message is somebody else's, who may be gone by now; it tells once this side has spoken there itself."""


NOBODY = Party()


class Hooks(NamedTuple):
    """What a client is to do for its link, and whom to tell; the functions are called in the client's thread."""

    topics: tuple[str, ...]
    """Filters to subscribe to at every connection."""
    will: tuple[str, bytes] | None
    """(topic, payload) that the server publishes, retained, when this side vanishes without a goodbye."""
    tls: Context | None
    keepalive_s: int
    on_message: Callable[[str, bytes], None]
    """(topic, payload) has come."""
    on_ready: Callable[[int], None]
    """Connected and subscribed; with the largest packet that the server takes, 0 for no limit."""
    on_ack: Callable[[], None]
    """The server has answered for one message published."""
    on_cut: Callable[[int], None] = lambda _: None
    """A connection broke while messages with so many bytes, the largest of them, waited for an answer: they are lost."""
    on_failure: Callable[[str], None] = lambda _: None
    """It is of no use to go on, and why; the client has stopped."""
    on_unheard: Callable[[], None] = lambda: None
    """The server has refused a topic that was listened to besides ``topics``."""
    on_kept: Callable[[str], None] = lambda _: None
    """The server has sent what it keeps on a topic where nobody of ours keeps anything: dropped."""
    party: Party = NOBODY
