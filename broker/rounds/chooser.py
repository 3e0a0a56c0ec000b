"""What each device of a round is asked to do: as the job, its configurator and its traffic planner choose, and have learned."""

from collections.abc import Iterable

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.configurators import CONFIGURATORS, Candidate, Choice
from fleetune.broker.methods.traffic import TRAFFIC, laid_over
from fleetune.broker.rounds.open_round import OpenRound
from fleetune.broker.tasks import REASON_CHARS_MAX, Outcome, Task
from fleetune.device_runtime.contracts.wire import default_task_id
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import one_line


class Chooser:
    """Of one job."""

    def __init__(self, settings: Settings, patience: Patience) -> None:
        """Begin, having learned nothing."""
        self._settings, self._deadline_s = settings, patience.deadline_s
        self._configurator = CONFIGURATORS[settings.configurator]()
        self._learned = self._configurator.init(settings)
        self._traffic = TRAFFIC[settings.traffic]()
        self._carried = self._traffic.init(settings)

    def learn(self, outcome: Outcome) -> None:
        """Learn what came of a task."""
        self._learned = self._configurator.taught(self._learned, outcome)
        self._carried = self._traffic.learn(self._carried, outcome)

    def choice(self, number: int, position: int, device: str) -> Choice:
        """Choose the work of a device that is asked at a position in a round."""
        if number <= self._settings.head_rounds:
            work = device_work(self._settings, round_number=number, position=position)
            return Choice(self._configurator.prepare(self._learned, work))
        return self._configurator.choose(self._learned, Candidate(device, number, position))

    def tasks(
        self, open_round: OpenRound, devices: Iterable[str], *, version: int
    ) -> tuple[list[Task], dict[str, str]]:
        """Make the tasks of devices that are asked at once, from ``version``; and say who can be asked nothing, and why."""
        tasks: list[Task] = []
        unable: dict[str, str] = {}
        for device in devices:
            position = open_round.num_asked + len(tasks)
            choice = self.choice(open_round.number, position, device)
            if choice.work is None:
                unable[device] = choice.reason
            else:
                task = _task(open_round, position, device, version=version, work=choice.work)
                tasks.append(task._replace(reason=one_line(choice.reason, length_max=REASON_CHARS_MAX)))
        return self._packed(tasks), unable

    def _packed(self, tasks: list[Task]) -> list[Task]:
        """Lay over tasks of one round how their transfers are packed."""
        if not tasks or tasks[0].round <= self._settings.head_rounds:
            return tasks
        return laid_over(self._traffic, self._carried, tasks, deadline_s=self._deadline_s)


def _task(open_round: OpenRound, position: int, device: str, *, version: int, work: LocalWork) -> Task:
    """Make the task of a device at a position; its identity is another where it, or a whole attempt, was asked before."""
    number = open_round.number
    identity = default_task_id("train", number, device)
    return Task(
        task_id=f"{identity}-{position}" if open_round.first or device in open_round.tasks else identity,
        device_id=device,
        role="train",
        round=number,
        version=version,
        position=position,
        work=work,
    )
