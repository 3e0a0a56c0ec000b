"""What was heard of a fleet, and what follows from it; no socket and no clock."""

from collections import Counter
from statistics import median

from msgspec.structs import replace

from fleetune.device_runtime.contracts.fields import WATCHED_ROUNDS_MAX, is_name
from fleetune.device_runtime.contracts.wire import (
    AggregatorStatus,
    DeviceStatus,
    RoundFigures,
    View,
    aggregator_topic,
    decode,
    device_topic,
)
from fleetune.device_runtime.errors import WireError
from fleetune.toolkit.watching.state import SLOW, STATES, DeviceState, FleetState, JobState

DEVICES_MAX = 20_000
"""Devices that are remembered; statuses of further ones are left out."""
ROUNDS_MAX = 4096
_SILENT = 3
_IDLE = 4
"""Who does not work tells so many times less often."""
_WORKING = ("fetching", "training", "evaluating", "masking")
_COMPARED = 3
"""So many have to have trained before one of them is slow."""


class Fleet:
    """One job. ``take`` every message, ask for ``state``."""

    def __init__(self, job: str) -> None:
        self._job = job
        self._status: AggregatorStatus | None = None
        self._view: View | None = None
        self._viewed_at = 0.0
        self._figures: dict[int, RoundFigures] = {}
        self._devices: dict[str, tuple[DeviceStatus, float]] = {}
        self._paces: dict[str, float] = {}
        """Seconds a step of devices here, as they trained last."""

    @property
    def topics(self) -> list[str]:
        """What to subscribe to."""
        own = [aggregator_topic(self._job), aggregator_topic(self._job, "view")]
        return [device_topic(self._job, "+", "status"), *own]

    @property
    def rounds_from(self) -> int:
        """The first round that is not known yet."""
        return max(self._figures, default=-1) + 1

    @property
    def lacks_rounds(self) -> bool:
        """Whether the aggregator's last answer was full, so that there may be more."""
        return self._view is not None and len(self._view.figures) >= WATCHED_ROUNDS_MAX

    @property
    def is_viewed(self) -> bool:
        """Whether the aggregator has answered."""
        return self._view is not None

    def num_untold(self, since: float) -> int:
        """Devices online that have not told what they are at since then."""
        return sum(1 for one, at in self._devices.values() if one.online and (at < since or not one.phase))

    def take(self, topic: str, payload: bytes, now: float) -> None:
        """Take a message; what is none, or says another name than its topic, is left out."""
        parts = topic.split("/")
        is_status = len(parts) == 6 and parts[3] == "device" and parts[5] == "status"
        if is_status and not payload:
            self._devices.pop(parts[4], None)
            self._paces.pop(parts[4], None)
        if not payload:
            return
        try:
            message = decode(payload)
        except WireError:
            return
        match message:
            case DeviceStatus() if is_status and message.device_id == parts[4] and is_name(parts[4]):
                self._take_status(message, now)
            case AggregatorStatus() if topic == aggregator_topic(self._job) and message.session:
                self._status = message
            case View() if topic == aggregator_topic(self._job, "view") and message.job == self._job:
                self._take_view(message, now)

    def state(self, now: float) -> FleetState:
        """Return the fleet as it stands at ``now``, the clock of ``take``."""
        usual = self._usual_step_s()
        devices = [
            self._device(*self._devices[name], now=now, usual_s=usual) for name in sorted(self._devices)
        ]
        return FleetState(
            job=self._job_state(now),
            counts=dict(Counter(device.state for device in devices)),
            devices=devices,
            rounds=[self._figures[number] for number in sorted(self._figures)],
            tell_every_s=self._status.tell_every_s if self._status else 0.0,
        )

    def _take_status(self, status: DeviceStatus, now: float) -> None:
        """Keep a status; of a device that is gone, what it was at."""
        name = status.device_id
        if name not in self._devices and len(self._devices) >= DEVICES_MAX:
            return
        before = self._devices.get(name, (status, now))[0]
        if not status.online and before.session == status.session:
            status = replace(before, online=False, paused="")
        self._devices[name] = status, now
        if not status.online:
            self._paces.pop(name, None)
        elif status.step_s:
            self._paces[name] = status.step_s

    def _take_view(self, view: View, now: float) -> None:
        if self._view and view.version < self._view.version:
            self._figures.clear()  # the job began anew
        self._view, self._viewed_at = view, now
        self._figures |= {figures.round: figures for figures in view.figures}
        while len(self._figures) > ROUNDS_MAX:
            del self._figures[min(self._figures)]

    def _usual_step_s(self) -> float:
        """Median of the seconds a step of those here; 0 where they are too few to say."""
        return median(self._paces.values()) if len(self._paces) >= _COMPARED else 0.0

    def _device(self, status: DeviceStatus, at: float, *, now: float, usual_s: float) -> DeviceState:
        name, heard_s = status.device_id, now - at
        left_s = status.left_s - heard_s if status.left_s else 0.0
        is_working = status.phase in (*_WORKING, "delivering") and status.online
        to_do_s = max(status.steps - status.step, 0) * status.step_s - heard_s
        left_out = self._view.left_out.get(name) if self._view else None
        holds = {
            "gone": not status.online,
            "paused": status.online and bool(status.paused),
            "silent": status.online and bool(status.phase) and heard_s > self._bears_s(status),
            "late": is_working and bool(status.left_s) and max(to_do_s, 0.0) > left_s,
            "slow": is_working and bool(usual_s) and status.step_s > SLOW * usual_s,
            "left out": left_out is not None,
            "refused": bool(status.said),
        }
        state = next((one for one in STATES if holds[one]), status.phase or "online")
        reasons = {
            "paused": status.paused,
            "silent": f"nothing heard for {heard_s:.0f} s",
            "late": f"round {status.round} closes in {left_s:.0f} s"
            if left_s > 0
            else f"round {status.round} is over",
            "slow": f"{status.step_s:.3g} s a step; the median is {usual_s:.3g} s",
            "left out": f"not asked until round {left_out}" + f"; {status.said}" * bool(status.said),
        }
        return DeviceState(
            device_id=name,
            state=state,
            why=reasons.get(state, status.said),
            is_online=status.online,
            is_paused=holds["paused"],
            is_silent=holds["silent"],
            is_late=holds["late"],
            is_slow=holds["slow"],
            left_s=left_s,
            heard_s=heard_s,
            **{name: getattr(status, name) for name in _SAME},
        )

    def _bears_s(self, status: DeviceStatus) -> float:
        """So long a device may be silent: one tells nothing while a step takes its time."""
        every_s = self._status.tell_every_s if self._status else 0.0
        rests = 1 if status.phase in _WORKING and not status.paused else _IDLE
        return _SILENT * every_s * rests + 3 * status.step_s if every_s else float("inf")

    def _job_state(self, now: float) -> JobState:
        status, view = self._status, self._view
        if status is None:
            return JobState(job=self._job, aggregator="unknown")
        state = JobState(
            job=self._job,
            aggregator="finished" if status.finished else "here" if status.online else "away",
            round=status.round,
            version=status.version,
        )
        if view is None or not (status.online and view.session == status.session):
            known = (
                {"num_rounds": view.num_rounds, "round": view.round, "version": view.version} if view else {}
            )
            return replace(state, is_told=view is not None, **known)
        left_s = view.left_s - (now - self._viewed_at) if view.left_s else 0.0
        same = {name: getattr(view, name) for name in _OF_VIEW}
        return replace(state, is_told=True, left_s=left_s, **same)


_SAME = (
    *("phase", "round", "step", "steps", "step_s", "memory_mb", "temperature_c"),
    *("mb_sent", "mb_received", "software", "said"),
)
"""Fields that a state has from the status as they are."""
_OF_VIEW = (
    *("software", "round", "num_rounds", "version", "is_open", "num_pending", "num_accepted", "num_refused"),
    *("pending", "dropped"),
)
