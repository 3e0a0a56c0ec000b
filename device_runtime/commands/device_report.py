"""What a device did, counted event by event, for its report."""

import logging
import statistics
import time
from collections import Counter
from collections.abc import Callable

import msgspec

from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.commands.peak_memory import peak_rss_mb
from fleetune.device_runtime.commands.systemd import Notifier
from fleetune.device_runtime.network.connection import Connection
from fleetune.device_runtime.rules.gate import Gate

log = logging.getLogger(__name__)

_STEP_EVERY_S = 5.0
"""A person who reads along hears of a step so often."""


class DeviceReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a device did since its process started."""

    device_id: str
    rounds: int
    """Updates that the aggregator took."""
    refused: int
    """Updates and reports that it did not take, and work that could not be done."""
    evaluations: int
    steps: int
    pauses: int
    """Times at which its rules forbade it to work."""
    paused_s: float
    step_ms_median: float | None
    mean_active_layers: float | None
    bytes_sent: int
    """Payload of all MQTT messages."""
    bytes_received: int
    dropped: int
    """Messages that came faster than they could be taken, or were too large; what they held is asked for again."""
    peak_rss_mb: float
    wall_s: float
    reason: str
    """Why it stopped."""


class Tally:
    """Told of every event; tells systemd and whoever reads along."""

    def __init__(self, on_event: Callable[[Event], object] | None, notifier: Notifier) -> None:
        """Begin to count; ``on_event`` gets what a person wants to read, ``notifier`` everything as its status."""
        self._on_event, self._notifier = on_event, notifier
        self._started = time.monotonic()
        self._kinds: Counter[str] = Counter()
        self._active: list[float] = []
        self._seconds: list[float] = []
        self._told_at = self._started

    def __call__(self, event: Event) -> None:
        """Count an event, log it and pass it on; of steps one every few seconds is."""
        self._kinds[event.kind] += 1
        self._notifier.status = str(event)
        if event.kind == "step":
            self._active.append(event.values["active_layers"])
            self._seconds.append(event.values["seconds"])
        now = time.monotonic()
        if event.kind != "step" or now - self._told_at >= _STEP_EVERY_S:
            self._told_at = now
            self._tell(event)

    def _tell(self, event: Event) -> None:
        """To the log, where a data file that is cut is a warning unless somebody reads along."""
        is_warning = event.kind == "data" and not self._on_event
        log.log(logging.WARNING if is_warning else logging.INFO, "%s", event)
        if self._on_event:
            self._on_event(event)

    def report(self, device_id: str, *, link: Connection, gate: Gate, reason: str) -> DeviceReport:
        """What it came to until now."""
        kinds = self._kinds
        return DeviceReport(
            device_id=device_id,
            rounds=0 if kinds["evaluated"] else kinds["accepted"],
            refused=kinds["refused"] + kinds["declined"],
            evaluations=kinds["evaluated"],
            steps=kinds["step"],
            pauses=gate.num_pauses,
            paused_s=gate.paused_s,
            step_ms_median=1000 * statistics.median(self._seconds) if self._seconds else None,
            mean_active_layers=statistics.fmean(self._active) if self._active else None,
            bytes_sent=link.bytes_sent,
            bytes_received=link.bytes_received,
            dropped=link.dropped,
            peak_rss_mb=peak_rss_mb(),
            wall_s=time.monotonic() - self._started,
            reason=reason,
        )
