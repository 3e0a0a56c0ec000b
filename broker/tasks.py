"""A task: what one device is asked to do, decided once and known by its identity ever after."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from fleetune.device_runtime.contracts.wire import ADAPTER, LocalWork, PolicySpec
from fleetune.device_runtime.errors import some

_LISTED = 16
REASON_CHARS_MAX = 200


class Task(NamedTuple):
    """The whole decision about one piece of one device's work."""

    task_id: str
    """Unique in the job."""
    device_id: str
    role: str
    round: int
    """Round that it belongs to; of an evaluation the version."""
    version: int
    """Adapter version that it starts from, or evaluates."""
    position: int
    """Place among the tasks of its round, from 0."""
    work: LocalWork
    reason: str = ""
    """Why this work, of a configurator that chooses; printable, at most REASON_CHARS_MAX."""


class Outcome(NamedTuple):
    """What came of a task: what a configurator learns from."""

    device_id: str
    work: LocalWork
    stats: Mapping[str, float]
    """As the device told them, such as ``loss``."""
    declined: str | None = None
    """Why the device did not do it, one of the wire's CAUSES; None if it did."""


def arm_of(work: LocalWork) -> str:
    """Name what a device is to do: its policy, or what else comes of its work."""
    return arm_name(work.policy) if work.learns == ADAPTER else work.learns


def arm_name(policy: PolicySpec) -> str:
    """Name a policy with its settings in a few words: ``suffix 0.5``, ``exact-k 0.25 falling``."""
    words = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in _settings(policy)]
    return " ".join([policy.name, *words])


def _settings(policy: PolicySpec) -> Iterator[object]:
    default = PolicySpec()
    for name in policy.__struct_fields__[1:]:
        value = getattr(policy, name)
        if value != getattr(default, name):
            yield value if isinstance(value, float | str) else f"{name} {value}"


def listed(devices: Sequence[str]) -> str:
    """Name devices in a line of the log; of many the first few."""
    return some(devices, at_most=_LISTED)
