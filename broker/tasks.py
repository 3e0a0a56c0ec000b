"""A task: what one device is asked to do, decided once and known by its identity ever after."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, NamedTuple

import msgspec

from fleetune.device_runtime.contracts.fields import (
    CLASSES_MAX,
    TRANSFER_BYTES_MAX,
    Count,
    Seconds,
    Share,
    Word,
)
from fleetune.device_runtime.contracts.work import ADAPTER, LocalWork, PolicySpec
from fleetune.device_runtime.errors import one_line, some

_LISTED = 16
_Bytes = Annotated[int, msgspec.Meta(ge=0, le=TRANSFER_BYTES_MAX)]
REASON_CHARS_MAX = 200

WEIGHT, LENGTH = "weight", "length"
"""Its update weighed less than it said; it moved the model less than it would have."""
FAR, REFUSED = "far-off", "refused"
"""Its update was many times longer than the others of the round, and left out; its update could not be one."""
AGAINST = "against"
"""Its update pointed against where the fleet goes, and was left out."""
HELD = (WEIGHT, LENGTH, FAR, AGAINST)
"""Marks of updates that counted for less than they said, or not at all."""
PARDONED = "pardoned"
"""The operator forgives all that was before."""
STRIKES = (FAR, REFUSED, AGAINST)
"""Marks that a device is left out for, when it has too many of them."""


class Packing(msgspec.Struct, frozen=True, omit_defaults=True):
    """How one transfer is packed."""

    codec: Word
    ratio: Share = 0.0
    bits: Count = 0


class Plan(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a traffic planner has decided beside a task's work, and what else it went by."""

    together: Count
    """Position of the first of the devices that it decided about at once."""
    deadline_s: Seconds = 0.0
    """That the round had then; 0 for none."""
    down: Packing | None = None
    """How the version is packed for the device; None: as the job says."""


class Noted(msgspec.Struct, frozen=True, omit_defaults=True):
    """What the aggregator notes of an accepted update beside its payload; 0 where it was not seen."""

    bytes_down: _Bytes = 0
    """Of the adapter that the device fetched for it."""
    seconds_down: Seconds = 0.0
    """Which that took, as the device told."""
    bytes_up: _Bytes = 0
    seconds_up: Seconds = 0.0
    """From the first request to the last chunk."""
    skipped: bool = False
    """It said that the last one counts again."""
    histogram: Annotated[tuple[Count, ...], msgspec.Meta(max_length=CLASSES_MAX)] = ()
    """How many of the device's samples are of which class; empty if it was not asked, or does not tell."""


NOTHING = Noted()

_Detail = Annotated[str, msgspec.Meta(max_length=REASON_CHARS_MAX)]


class Mark(msgspec.Struct, frozen=True):
    """One note about one device; of a kind one a round."""

    round: Count
    """The open round, or the last one closed."""
    device: Word
    kind: Word
    detail: _Detail = ""
    """In words; printable."""


def mark(round_number: int, device: str, kind: str, detail: str = "") -> Mark:
    """Make a mark; of ``detail`` what fits in a line is kept."""
    return Mark(round_number, device, kind, one_line(detail, length_max=REASON_CHARS_MAX))


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
    plan: Plan | None = None
    """Of a traffic planner that chooses."""


class Declined(NamedTuple):
    """What a device said when it declined a task."""

    cause: str
    """One of the wire's CAUSES."""
    reason: str = ""

    @property
    def is_lasting(self) -> bool:
        """Whether it would decline the same again: not what passes, such as a pause or a day that is spent."""
        return bool(self.cause)


class Note(NamedTuple):
    """Something that a round under masks goes by, kept until the round is closed."""

    kind: str
    device_id: str
    """Whose it is; empty for a decision."""
    content: bytes


class Outcome(NamedTuple):
    """What came of a task: what a configurator learns from."""

    device_id: str
    work: LocalWork
    stats: Mapping[str, float]
    """As the device told them, such as ``loss``."""
    declined: str | None = None
    """Why the device did not do it, one of the wire's CAUSES; None if it did."""
    round: int = 0
    num_samples: int = 0
    """Of the device, as it told."""
    noted: Noted = NOTHING


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
