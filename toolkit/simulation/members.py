"""Who takes turns under the pretended clock: virtual devices, each a real agent on a link that takes time, and the aggregator."""

from collections.abc import Callable
from math import inf
from typing import NamedTuple

from fleetune.broker.service.service import Service
from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.contracts.gaussian import NOISE_SECRET
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.loopback import Loopback, LoopbackLink
from fleetune.device_runtime.network.turns import Turns
from fleetune.toolkit.simulation.desks import Desk
from fleetune.toolkit.simulation.links import Line, TimedLink

HELLO_S = inf
"""Here no message is lost but by a device that leaves, which says hello when it is back."""


class Aggregator:
    """A real service and its link, which has no limit."""

    def __init__(self, link: LoopbackLink, service: Service) -> None:
        """Prepare; the service reads that link."""
        self._link, self._service = link, service

    def poll(self, now: float) -> None:
        """Take what has come, and do what is due."""
        while (message := self._link.receive(0.0)) is not None:
            self._service.take(*message, now)
        self._service.tick(now)

    def due_at(self, now: float) -> float:
        """As of the service."""
        return self._service.due_at(now)


class Place(NamedTuple):
    """Where virtual devices live."""

    server: Loopback
    turns: Turns
    adapter: FirstAdapter


class VirtualDevice:
    """A device that arrives and leaves; what it keeps stays, what it had in memory is gone."""

    def __init__(
        self,
        place: Place,
        identity: Identity,
        desk: Desk,
        *,
        line: Line,
        noise: bytes = b"",
        on_event: Callable[[Event], object] = lambda _: None,
    ) -> None:
        """Prepare; it is not there yet. ``noise`` is what its noise is made from."""
        self.identity, self.desk = identity, desk
        self.bytes_up = self.bytes_down = 0
        """Payload of all its messages, once it has left."""
        self._place, self._line, self._on_event = place, line, on_event
        self._files, self._outbox = MemoryFiles(), MemoryOutbox()
        self._files.write(NOISE_SECRET, noise)
        self._raw: LoopbackLink | None = None
        self._link: TimedLink
        self._agent: Agent

    @property
    def is_there(self) -> bool:
        """Whether it is connected."""
        return self._raw is not None

    @property
    def sent_by(self) -> float:
        """Time at which all that it has sent has arrived."""
        return self._link.sent_by

    def arrive(self, now: float) -> None:
        """Start, if it is not there."""
        if self._raw:
            return
        server, turns, adapter = self._place
        self._raw = server.connect(self.identity.topics, will=self.identity.will)
        self._link = TimedLink(self._raw, self._line, clock=lambda: turns.now)
        home = Home(
            self._link,
            self._outbox,
            self._files,
            self.identity,
            adapter,
            checkpoint_every=0,
            on_event=self._on_event,
            hello_s=HELLO_S,
        )
        self._agent = Agent(home, self.desk.workbench())
        turns.join(self._raw, self)

    def leave(self, now: float) -> None:
        """Lose power: what is on its way is lost, and the server tells the aggregator."""
        if self._raw is None:
            return
        self.desk.power_off(now)
        self.bytes_up += self._link.bytes_sent
        self.bytes_down += self._link.bytes_received
        self._place.turns.leave(self._raw)
        self._raw.kill()
        self._raw = None

    def poll(self, now: float) -> None:
        """Let time pass on its link, and the agent take its turn if it has something to do."""
        self._link.move(now)
        if self._link.has_mail(now) or self._own_due_at(now) <= now:
            self._agent.poll(now)
            self._link.hold(self.desk.busy_until)
            self._link.move(now)

    def due_at(self, now: float) -> float:
        """When something arrives, its work is done, or it has something to say."""
        return min(self._link.due_at, self._own_due_at(now))

    def _own_due_at(self, now: float) -> float:
        if self.desk.ends_at > now:
            return min(self.desk.ends_at, self._agent.talk_due_at(now))
        return self._agent.due_at(now)
