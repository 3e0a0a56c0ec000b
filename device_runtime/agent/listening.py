"""A device's ear for what is published once for all who want it: topics that it hears as long as it waits for their chunks."""

from collections.abc import Collection

from fleetune.device_runtime.contracts.wire import Offer, shared_topic
from fleetune.device_runtime.network.connection import Connection


class Listening:
    """The parts of streams that one device listens to; a server keeps what it knows of them for one connection only."""

    def __init__(self, link: Connection, job: str) -> None:
        """Hear nothing."""
        self.is_wide = True
        """Whether a part came quickly enough on this link when something was fetched last: else it asks for itself alone."""
        self._link, self._job = link, job
        self._topics: set[str] = set()
        self._connections, self._deaf_since = -1, -1
        """Number of the connection that the topics were asked for on; and of the one on which nothing is heard."""
        self._has_heard = False

    @property
    def is_of_use(self) -> bool:
        """Whether to listen, as far as is known."""
        return self.is_wide and self._link.can_listen and self._deaf_since != self._link.connections

    def stream_of(self, offer: Offer) -> str:
        """Stream that what is offered is to be asked for in; empty: in none."""
        return offer.shared if self.is_of_use else ""

    def to(self, parts: Collection[tuple[int, str]]) -> None:
        """Listen to these (part, stream), and to nothing else."""
        if not parts and not self._topics:
            return
        wanted = {shared_topic(self._job, stream, part) for part, stream in parts}
        if self._connections != self._link.connections:
            self._connections, self._topics = self._link.connections, set()
        for topic in sorted(self._topics - wanted):
            self._link.unlisten(topic)
        for topic in sorted(wanted - self._topics):
            self._link.listen(topic)
        self._topics = wanted

    def hears(self, topic: str) -> bool:
        """Whether what comes on a topic was asked for."""
        return topic in self._topics

    def heard(self) -> None:
        """Something came: the server lets this side hear."""
        self._has_heard = True

    def give_up(self) -> None:
        """Nothing came of what was asked for: on this connection none is asked for any more, unless some came before."""
        if not self._has_heard:
            self._deaf_since = self._link.connections
