"""Devices on slow links under the pretended clock: real agents and a real service, each link with a rate and a latency."""

from fleet import Aggregator, Device, World, first_adapter

from fleetune.device_runtime.agent.agent import Agent
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.toolkit.simulation.links import Line, TimedLink, Way


class OpenLink(TimedLink):
    """A link with time on which a device hears what is published for all; to listen takes none."""

    can_listen = True

    def listen(self, topic):
        self._inner.listen(topic)

    def unlisten(self, topic):
        self._inner.unlisten(topic)


class SharedWay(Way):
    """A direction of a line that several share: one message after the other, whoever sends it."""

    def __init__(self, rate, latency_s, free_at):
        super().__init__(rate, latency_s)
        self._shared = free_at

    def send(self, thing, *, size_bytes, now):
        self._free_at = max(self._free_at, self._shared[0])
        super().send(thing, size_bytes=size_bytes, now=now)
        self._shared[0] = self._free_at


def shared_link(line):
    """A kind of link: all of it are on this line together."""
    free_at = [0.0], [0.0]

    class SharedLink(TimedLink):
        def __init__(self, inner, _, *, clock):
            super().__init__(inner, line, clock=clock)
            self._down = SharedWay(lambda t: line.bandwidth(t)[0], line.latency_s, free_at[0])
            self._up = SharedWay(lambda t: line.bandwidth(t)[1], line.latency_s, free_at[1])

    return SharedLink


class SlowAggregator(Aggregator):
    """An aggregator whose messages take their time; ``link`` makes its link from one of the loopback."""

    def __init__(self, server, folder, *, link, clock, **options):
        super().__init__(server, folder, **options)
        self.link_kind, self.clock = link, clock

    def start(self, now=0.0):
        loopback, self.server = self.server, self
        self.connects = loopback.connect
        super().start(now)
        self.server, self.timed, self.link = loopback, self.link, self.inner
        return self

    def connect(self, topics, *, will):
        self.inner = self.connects(topics, will=will)
        return self.link_kind(self.inner, None, clock=self.clock)

    def poll(self, now):
        self.timed.move(now)
        while (message := self.timed.receive(0)) is not None:
            self.service.take(*message, now)
        self.service.tick(now)
        self.timed.move(now)

    def due_at(self, now):
        return min(self.timed.due_at, self.service.due_at(now))


class SlowDevice(Device):
    """A device whose messages take their time; what is on its way when it is killed is lost."""

    def __init__(self, server, number, *, line, clock, link=TimedLink, **options):
        super().__init__(server, None, number, **options)
        self.line, self.clock, self.link_kind = line, clock, link

    def start(self):
        self.link = self.server.connect(self.identity.topics, will=self.identity.will)
        self.timed = self.link_kind(self.link, self.line, clock=self.clock)
        home = Home(
            self.timed,
            self.outbox,
            self.files,
            self.identity,
            self.adapter,
            on_event=self.events.append,
            checkpoint_every=0,
            trusted=self.options.get("trusted"),
        )
        self.slow_agent = Agent(home, self.workbench)
        self.agent = self
        if self.turns:
            self.turns.join(self.link, self)
        return self

    def poll(self, now):
        self.timed.move(now)
        if self.timed.has_mail(now) or self.slow_agent.due_at(now) <= now:
            self.slow_agent.poll(now)
            self.timed.move(now)

    def due_at(self, now):
        return min(self.timed.due_at, self.slow_agent.due_at(now))


def slow_world(
    folder,
    count,
    *,
    bytes_s,
    latency_s=0.0,
    size=80_000,
    link=TimedLink,
    disturb=None,
    up_bytes_s=0.0,
    trusted=None,
    **changes,
):
    """A job of ``count`` devices, each behind a link of so many bytes a second both ways (of one or of each; up_bytes_s: up).

    80,000 float32 are 320 kB.
    """
    rates = bytes_s if isinstance(bytes_s, list) else [bytes_s] * count
    server = Loopback(disturb=disturb)
    fields = {"clients": count, "min_clients": count, "size": size, "in_memory": True, "down_codec": "whole"}
    aggregator = Aggregator(server, folder, **{**fields, **changes}).start()
    adapter = FirstAdapter.of(first_adapter(size))
    lines = [Line(lambda _, rate=rate: (rate, up_bytes_s or rate), latency_s) for rate in rates]
    running = World(server, aggregator, [])
    running.devices = [
        SlowDevice(
            server,
            n,
            line=lines[n],
            clock=lambda: running.now,
            link=link[n] if isinstance(link, list) else link,
            size=size,
            adapter=adapter,
            trusted=trusted,
        )
        for n in range(count)
    ]
    for device in running.devices:
        device.turns = running.turns
        device.start()
    return running


def shared_world(folder, count, *, bytes_s, latency_s=0.0, size=80_000, **changes):
    """A job of ``count`` devices, one that evaluates, and their aggregator: all of them share one line to the server."""
    running, clock = None, lambda: running.now if running else 0.0
    server, link = Loopback(), shared_link(Line(lambda _: (bytes_s, bytes_s), latency_s))
    fields = {"clients": count, "min_clients": count, "size": size, "in_memory": True, "down_codec": "whole"}
    aggregator = SlowAggregator(server, folder, link=link, clock=clock, **{**fields, **changes}).start()
    running, adapter = World(server, aggregator, []), FirstAdapter.of(first_adapter(size))
    shared = {"line": None, "clock": clock, "link": link, "size": size, "adapter": adapter}
    running.devices = [SlowDevice(server, n, session=f"start-{n}", **shared) for n in range(count)]
    running.devices.append(SlowDevice(server, 9, role="evaluate", session="start-9", **shared))
    for device in running.devices:
        device.turns = running.turns
        device.start()
    return running
