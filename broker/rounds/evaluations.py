"""Which evaluating device owes a report on which version; rounds do not wait for them."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Iterable

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.rounds.actions import Assign
from fleetune.broker.tasks import Task
from fleetune.device_runtime.contracts.fields import FIGURE_MAX
from fleetune.device_runtime.contracts.wire import Report, default_task_id

_BEHIND_MAX = 8
"""An evaluating device here keeps versions from being forgotten, up to so many times as many as are kept anyway."""


class Evaluations:
    """The evaluating devices of one job; every due version, in order, is measured by each.

    No event takes longer for more devices but ``advance``, once a version.
    """

    def __init__(
        self,
        settings: Settings,
        reported: Iterable[tuple[int, str]],
        *,
        allowed: Collection[str] = (),
        keep_versions: int = 0,
    ) -> None:
        """Begin or resume; call ``advance`` next.

        Args:
            settings: the job's.
            reported: (version, device) of the reports at hand.
            allowed: the devices that may evaluate; empty for all.
            keep_versions: so many of the newest versions can be measured, and those that devices here still owe; 0 for all.
        """
        self.oldest = 0
        """Versions before it are owed by nobody any more, and need not be kept."""
        self._keep = keep_versions
        self._settings, self._allowed = settings, frozenset(allowed)
        self._newest = -1
        self._due: list[int] = []
        self._at: dict[str, int] = {}
        """Present devices, and the version each is at; -1 for none."""
        self._reporters: dict[int, set[str]] = {}
        self._known: set[str] = set()
        """Every device, present or not."""
        self._owed: Counter[int] = Counter()
        """How many devices here lack a report, by due version."""
        self._passed: Counter[str] = Counter()
        """How many of the due versions, from the very first, a device has behind it."""
        self._gone = 0
        """How many of the due versions are forgotten."""
        for version, device in reported:
            self._reporters.setdefault(version, set()).add(device)
            if self.may(device):
                self._known.add(device)

    def may(self, device: str) -> bool:
        """Whether a device may evaluate."""
        return not self._allowed or device in self._allowed

    @property
    def present(self) -> tuple[str, ...]:
        """Evaluating devices here."""
        return tuple(self._at)

    def task(self, device: str) -> Task | None:
        """What a device is doing, if it is here and at something."""
        at = self._at.get(device, -1)
        return self._task(device, at) if at >= 0 else None

    def advance(self, newest: int, *, is_last: bool) -> list[Assign]:
        """Learn of the versions up to ``newest``, and return the offers to those who were at nothing."""
        if newest == self._newest:
            return []
        for version in range(self._newest + 1, newest + 1):
            if version % self._settings.evaluate_every == 0 or (is_last and version == newest):
                self._due.append(version)
                done = self._reporters.setdefault(version, set())
                self._owed[version] = sum(device not in done for device in self._at)
        self._newest = newest
        self._forget()
        return [
            offer for device in [d for d, at in self._at.items() if at == -1] for offer in self._next(device)
        ]

    def hello(self, device: str) -> list[Assign]:
        """A device is here, or still here: offer what it is at, or is to do next."""
        self._known.add(device)
        if device not in self._at:
            self._at[device] = -1
            self._owed.update(self._lacking(device))
        at = self._at[device]
        return [Assign(self._task(device, at))] if at >= 0 else self._next(device)

    def offline(self, device: str) -> None:
        """A device is gone."""
        if self._at.pop(device, None) is not None:
            self._owed.subtract(self._lacking(device))

    def declined(self, device: str, task_id: str) -> list[Assign]:
        """A device cannot evaluate the version that it was sent: it counts as reported."""
        task = self.task(device)
        return self._done(task.version, device) if task and task.task_id == task_id else []

    def judge(self, report: Report, newest: int) -> str:
        """Why a report is refused; empty if it is welcome."""
        if report.device_id not in self._known:
            return f"device {report.device_id!r} was not asked to evaluate"
        if not 0 <= report.version <= newest:
            return f"version {report.version} is unknown; the newest is {newest}"
        if report.task_id != default_task_id("evaluate", report.version, report.device_id):
            return f"task {report.task_id[:120]!r} is not the evaluation of version {report.version}"
        if not (abs(report.loss) <= FIGURE_MAX and 0 <= report.accuracy <= 1 and report.num_samples > 0):
            found = f"loss {report.loss}, accuracy {report.accuracy}, {report.num_samples} samples"
            return f"{found}: not a measurement"
        return ""

    def reported(self, report: Report) -> list[Assign]:
        """A report that ``judge`` passed is durable: offer what the device is to do next."""
        return self._done(report.version, report.device_id)

    def has_reports(self, version: int) -> bool:
        """Whether any device has reported on a version."""
        return bool(self._reporters.get(version))

    def is_complete(self, version: int) -> bool:
        """Whether no device here still owes a report on a version."""
        return self._owed[version] == 0

    def num_silent(self, version: int) -> int:
        """How many devices, present or not, have not reported on a version."""
        return len(self._known) - len(self._reporters.get(version, ()))

    def silent(self, version: int) -> list[str]:
        """Which devices, present or not, have not reported on a version."""
        return sorted(self._known - self._reporters.get(version, set()))

    def _done(self, version: int, device: str) -> list[Assign]:
        reporters = self._reporters.get(version)
        if reporters is not None and device not in reporters:
            reporters.add(device)
            if device in self._at and version in self._owed:
                self._owed[version] -= 1
        if self._at.get(device) == version:
            self._at[device] = -1
        return self._next(device) if self._at.get(device) == -1 else []

    def _next(self, device: str) -> list[Assign]:
        self._passed[device] = max(self._passed[device], self._gone)
        while self._passed[device] - self._gone < len(self._due):
            version = self._due[self._passed[device] - self._gone]
            if device not in self._reporters[version]:
                self._at[device] = version
                return [Assign(self._task(device, version))]
            self._passed[device] += 1
        return []

    def _forget(self) -> None:
        """Let go of versions that are too old for anyone to measure."""
        if not self._keep:
            return
        owed = min((v for v in self._due if self._owed[v]), default=self._newest)
        first = max(min(owed, self._newest - self._keep + 1), self._newest - _BEHIND_MAX * self._keep + 1)
        count = bisect_left(self._due, first)
        for version in self._due[:count]:
            del self._reporters[version]
            del self._owed[version]
        del self._due[:count]
        self._gone += count
        self.oldest = max(self.oldest, first)
        self._at = {device: -1 if at < self.oldest else at for device, at in self._at.items()}

    def _lacking(self, device: str) -> list[int]:
        return [version for version in self._due if device not in self._reporters[version]]

    def _task(self, device: str, version: int) -> Task:
        work = device_work(
            self._settings, round_number=max(version, self._settings.head_rounds + 1), position=0
        )
        identity = default_task_id("evaluate", version, device)
        return Task(
            task_id=identity,
            device_id=device,
            role="evaluate",
            round=version,
            version=version,
            position=0,
            work=work,
        )
