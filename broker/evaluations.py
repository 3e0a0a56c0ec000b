"""Which evaluating device owes a report on which version; rounds do not wait for them."""

from collections.abc import Iterable

import numpy as np

from fleetune.broker.actions import Send
from fleetune.broker.job import Settings
from fleetune.device_runtime.contracts.wire import Report


class Evaluations:
    """The evaluating devices of one job; every due version, in order, is measured by each."""

    def __init__(self, settings: Settings, reported: Iterable[tuple[int, str]]) -> None:
        """Begin or resume; ``reported`` = (version, device) of the reports at hand."""
        self._settings = settings
        self._reported = set(reported)
        self._at: dict[str, int] = {}
        """Present devices, and the version each is at; -1 for none."""
        self._known = {device for _, device in self._reported}
        """Every device, present or not."""

    @property
    def present(self) -> tuple[str, ...]:
        """Evaluating devices here."""
        return tuple(self._at)

    def hello(self, device: str, newest: int) -> list[Send]:
        """A device is here, or still here: what it is at, or is to do next, is sent to it."""
        self._known.add(device)
        at = self._at.setdefault(device, -1)
        return self._send(device, at if at >= 0 else self._next(device, newest))

    def offline(self, device: str) -> None:
        """A device is gone."""
        self._at.pop(device, None)

    def declined(self, device: str, version: int) -> None:
        """A device cannot evaluate the version it was sent: it counts as reported."""
        if self._at.get(device) == version:
            self._at[device] = -1
            self._reported.add((version, device))

    def judge(self, report: Report, newest: int) -> str:
        """Why a report is refused; empty if it is welcome."""
        if report.device_id not in self._known:
            return f"device {report.device_id!r} was not asked to evaluate"
        if not 0 <= report.version <= newest:
            return f"version {report.version} is unknown; the newest is {newest}"
        if not (np.isfinite(report.loss) and 0 <= report.accuracy <= 1 and report.num_samples > 0):
            found = f"loss {report.loss}, accuracy {report.accuracy}, {report.num_samples} samples"
            return f"{found}: not a measurement"
        return ""

    def reported(self, report: Report) -> None:
        """A report that ``judge`` passed is durable."""
        self._reported.add((report.version, report.device_id))
        if self._at.get(report.device_id) == report.version:
            self._at[report.device_id] = -1

    def offers(self, newest: int) -> list[Send]:
        """What to send to those who are at nothing."""
        idle = [device for device, at in self._at.items() if at == -1]
        return [send for device in idle for send in self._send(device, self._next(device, newest))]

    def has_reports(self, version: int) -> bool:
        """Whether any device has reported on a version."""
        return any(v == version for v, _ in self._reported)

    def is_complete(self, version: int) -> bool:
        """Whether no device here still owes a report on a version."""
        return not self._is_due(version) or all((version, d) in self._reported for d in self._at)

    def silent(self, version: int) -> list[str]:
        """Devices, present or not, without a report on a version."""
        return sorted(device for device in self._known if (version, device) not in self._reported)

    def _send(self, device: str, version: int) -> list[Send]:
        if version < 0:
            return []
        self._at[device] = version
        return [Send(device, "evaluate", version, version, 0, 0.0)]

    def _next(self, device: str, newest: int) -> int:
        due = (version for version in range(newest + 1) if self._is_due(version))
        return next((version for version in due if (version, device) not in self._reported), -1)

    def _is_due(self, version: int) -> bool:
        return version % self._settings.evaluate_every == 0 or version == self._settings.rounds
