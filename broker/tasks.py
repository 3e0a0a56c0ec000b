"""A task: what one device is asked to do, decided once and known by its identity ever after."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.errors import some

_LISTED = 16


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


class Outcome(NamedTuple):
    """What came of a task: what a configurator learns from."""

    device_id: str
    work: LocalWork
    stats: Mapping[str, float]
    """As the device told them, such as ``loss``."""


def listed(devices: Sequence[str]) -> str:
    """Name devices in a line of the log; of many the first few."""
    return some(devices, at_most=_LISTED)
