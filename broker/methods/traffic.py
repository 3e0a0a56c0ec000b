"""Traffic planners choose how what each device of a round sends and is sent is packed, and may learn from what came of it."""

from collections.abc import Callable, Sequence
from typing import Any

from fleetune.broker.methods.bitwidth import bits
from fleetune.broker.methods.caesar import CAESARS
from fleetune.broker.methods.carrying import Carriage, Traffic
from fleetune.broker.methods.simple_traffic import SIMPLE
from fleetune.broker.tasks import REASON_CHARS_MAX, Plan, Task
from fleetune.device_runtime.errors import one_line
from fleetune.device_runtime.tables import Table

__all__ = ["TRAFFIC", "Carriage", "Traffic", "fixed", "laid_over"]


def fixed() -> Traffic:
    """Leave all as the job says, for all devices."""
    return Traffic(
        lambda settings: None,
        lambda _, tasks, deadline_s: [Carriage(task.work) for task in tasks],
        lambda state, _: state,
        is_fixed=True,
    )


def laid_over(traffic: Traffic, state: Any, tasks: Sequence[Task], *, deadline_s: float) -> list[Task]:
    """Tasks of devices that are asked at once, with what a planner chooses for them; those of ``fixed`` as they were."""
    if traffic.is_fixed:
        return [*tasks]
    chosen = traffic.choose(state, tasks, deadline_s)
    return [
        _laid(task, carriage, Plan(tasks[0].position, deadline_s, carriage.down))
        for task, carriage in zip(tasks, chosen, strict=True)
    ]


def _laid(task: Task, carriage: Carriage, plan: Plan) -> Task:
    why = "; ".join(filter(None, (task.reason, carriage.reason)))
    return task._replace(work=carriage.work, plan=plan, reason=one_line(why, length_max=REASON_CHARS_MAX))


TRAFFIC: Table[Callable[[], Traffic]] = Table(
    "traffic planner", {"fixed": fixed, "bits": bits, **CAESARS, **SIMPLE}
)
