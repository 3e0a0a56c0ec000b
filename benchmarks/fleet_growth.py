"""What an event costs the aggregator alone as its fleet grows, in CPU seconds for all devices together; 1 is linear.

Each row is one kind of event, once from every device where the row does not say another number: state machine, ledger on disk,
server in memory. No training, no network. A cost an event that grows with the fleet shows as an exponent near 2.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import table
from benchmarks.rounds import ARTIFACT, JOB, OUTGOING, PAYLOAD, hello_of, update_of
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.rounds.actions import Action, Enrol
from fleetune.broker.rounds.evaluations import Evaluations
from fleetune.broker.rounds.federation import Federation
from fleetune.broker.service.uploads import GROUP_MAX
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.store import Arrival
from fleetune.broker.tasks import Task
from fleetune.device_runtime.contracts.wire import Report, default_task_id
from fleetune.device_runtime.network.loopback import Loopback

SIZES, REPEATS = (1_000, 3_000, 10_000), 3
_SAMPLE = 500
"""Events that are timed where one is enough for all."""
Spent = dict[str, float]


def measure(say: Callable[[str], None], *, repeats: int = REPEATS) -> dict[str, Any]:
    """One row per kind of event: CPU seconds at each size, the best of ``repeats``, and the exponent over all sizes."""
    best: dict[str, dict[int, float]] = {}
    for size in SIZES:
        for spent in (all_events(size) for _ in range(repeats)):
            for event, seconds in spent.items():
                of = best.setdefault(event, {})
                of[size] = min(seconds, of.get(size, math.inf))
        say(f"{size} devices: {sum(found[size] for found in best.values()):.3g} s")
    rows = [
        {"event": event, **{str(n): found[n] for n in SIZES}, "exponent": _exponent(found)}
        for event, found in best.items()
    ]
    for line in table(rows):
        say(line)
    return {"benchmark": "fleet-growth", "repeats": repeats, "cases": rows}


def all_events(size: int) -> Spent:
    """CPU seconds of each kind of event in a fleet of ``size``."""
    spent: Spent = {}
    for measured in (_round, _waiting, _few_of_many, _evaluations, _ledger, _loopback):
        measured(size, spent)
    return spent


def _exponent(found: dict[int, float]) -> float:
    first, last = SIZES[0], SIZES[-1]
    return round(math.log(found[last] / found[first]) / math.log(last / first), 2)


@contextmanager
def _timed(spent: Spent, event: str) -> Iterator[None]:
    started = time.process_time()
    yield
    spent[event] = time.process_time() - started


def _settings(size: int, *, rounds: int = 2) -> Settings:
    return Settings(job=JOB, artifact=ARTIFACT, rounds=rounds, clients=size, min_clients=size)


def _round(size: int, spent: Spent) -> None:
    """A round of all: they come, are asked, come back while they owe an update, vanish, come back, and deliver."""
    machine = Federation(_settings(size), Patience(), now=0.0)
    hellos = [hello_of(number) for number in range(size)]
    with _timed(spent, "hellos while gathering"):
        for hello in hellos[:-1]:
            machine.hello(hello, 0.0)
    with _timed(spent, "the round opens"):
        enrol, *offers = machine.hello(hellos[-1], 0.0)
    assert isinstance(enrol, Enrol)
    assert len(offers) == size, "all are asked"
    with _timed(spent, "hellos of devices at work"):
        for hello in hellos:
            machine.hello(hello, 1.0)
            machine.due_at()
    with _timed(spent, "devices vanish, and come back"):
        for hello in hellos:
            machine.offline(hello.device_id, 1.0)
            machine.due_at()
        for hello in hellos:
            machine.hello(hello, 1.0)
    tasks = {task.device_id: task for task in enrol.tasks}
    updates = [update_of(tasks[hello.device_id], hello.device_id) for hello in hellos]
    with _timed(spent, "updates accepted, the round closes"):
        for update in updates:
            machine.judge(update)
            machine.accepted(update, 2.0)
            machine.tick(2.0)
            machine.due_at()
    assert machine.rounds.closed == 1, "the round is over"


def _waiting(size: int, spent: Spent) -> None:
    """A round that lacks one device more than there are: hellos and ticks while it waits."""
    machine = Federation(_settings(size + 1), Patience(), now=0.0)
    for number in range(size):
        machine.hello(hello_of(number), 0.0)
    with _timed(spent, "one hello, one tick while gathering, x 500"):
        for number in range(_SAMPLE):
            machine.hello(hello_of(number), 0.0)
            machine.tick(0.0)
            machine.due_at()


def _few_of_many(size: int, spent: Spent) -> None:
    """Rounds of 100 of all."""
    machine = Federation(_settings(100, rounds=20), Patience(), now=0.0)
    asked = [task for number in range(size) for task in _asked(machine.hello(hello_of(number), 0.0))]
    with _timed(spent, "10 rounds of 100 of all"):
        for _ in range(10):
            updates = [update_of(task, task.device_id) for task in asked]
            asked = [task for update in updates for task in _asked(machine.accepted(update, 1.0))]
    assert machine.rounds.closed == 10, "ten rounds are over"


def _asked(actions: Iterable[Action]) -> list[Task]:
    return [task for action in actions if isinstance(action, Enrol) for task in action.tasks]


def _evaluations(size: int, spent: Spent) -> None:
    """Evaluating devices come, report a version, and learn of the next."""
    machine = Evaluations(_settings(1), (), keep_versions=64)
    names = [f"device-{number}" for number in range(size)]
    machine.advance(0, is_last=False)
    with _timed(spent, "a version evaluated by all"):
        for name in names:
            machine.hello(name)
        for name in names:
            machine.reported(_report(name, 0))
            machine.is_complete(0)
            machine.num_silent(0)
        machine.advance(1, is_last=False)


def _report(name: str, version: int) -> Report:
    identity = default_task_id("evaluate", version, name)
    return Report(
        device_id=name, job=JOB, task_id=identity, round=version, version=version, loss=1.0, accuracy=0.5, num_samples=5
    )  # fmt: skip


def _task(settings: Settings, number: int) -> Task:
    name, work = f"device-{number}", device_work(settings, round_number=1, position=number)
    return Task(default_task_id("train", 1, name), name, "train", 1, 0, number, work)


def _ledger(size: int, spent: Spent) -> None:
    """A ledger on disk: all enrolled, all accepted, the version made, and opened again."""
    settings = _settings(size)
    tasks = [_task(settings, number) for number in range(size)]
    with tempfile.TemporaryDirectory() as folder:
        with Ledger(Path(folder), settings) as ledger:
            ledger.add_version(0, b"", round_number=0)
            with _timed(spent, "ledger: tasks enrolled"):
                ledger.enrol(tasks)
            with _timed(spent, "ledger: updates accepted"):
                for start in range(0, size, GROUP_MAX):
                    some = tasks[start : start + GROUP_MAX]
                    for task in some:
                        ledger.digest_of(task.task_id)
                    ledger.accept_all([Arrival(update_of(task, task.device_id), PAYLOAD) for task in some])
            with _timed(spent, "ledger: the version made"):
                ledger.add_version(1, b"", round_number=1)
        with _timed(spent, "ledger: opened again"), Ledger(Path(folder), settings) as ledger:
            Federation(settings, Patience(), now=0.0, past=ledger.past(), outcomes=ledger.outcomes())


def _loopback(size: int, spent: Spent) -> None:
    """Every device of a server in memory says one thing, and is told one."""
    server = Loopback()
    aggregator = server.connect(["j/device/+/up"])
    links = [server.connect([f"j/device/{n}/down"]) for n in range(size)]
    with _timed(spent, "loopback: a message each way"):
        for number, link in enumerate(links):
            link.publish(f"j/device/{number}/up", OUTGOING.manifest.chunk_digests)
            aggregator.publish(f"j/device/{number}/down", b"")
            link.receive(0.0)
            server.take_news()
