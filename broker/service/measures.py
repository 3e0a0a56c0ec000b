"""What the bounds of a round go by, as its updates come, and what is noted of those that are beyond them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np

from fleetune.broker.jobs.settings import PLAIN, Settings
from fleetune.broker.methods.bounds import (
    UPDATES_MIN,
    Measured,
    bounds,
    direction_of,
    held,
    length_of,
    norm_of,
)
from fleetune.broker.methods.heading import AGAINST as AGAINST_COSINE
from fleetune.broker.methods.heading import (
    CLIENTS_MIN,
    ELEMENTS_MIN,
    RECENT_MAX,
    TURNED,
    Direction,
    Heading,
    Votes,
    least_agreement,
)
from fleetune.broker.methods.strategies import OF_ALL
from fleetune.broker.methods.strategy import Bound, Strategy, Update
from fleetune.broker.tasks import AGAINST, FAR, LENGTH, PARDONED, WEIGHT, Mark, mark
from fleetune.device_runtime.arrays import Arrays

FEATURES_CAP = 2.0
"""Class sums of features this many times longer or shorter than the middle ones are left out: one model makes all of them."""

SMALL = 0.001
"""No update is long that moves less than this share of the version's norm, however short the others are."""

_AGREEMENTS = " agreements"
"""In what a version leaves, beside tensors: no tensor has such a name."""

Arrived = Callable[[], Iterator[Update]]
"""All updates of the round that were added, as they came, one in memory at a time."""


class _Way(NamedTuple):
    """Where an update goes."""

    direction: Direction
    length: float


class Measures:
    """Of the updates that make the next version."""

    def __init__(self, settings: Settings, heading: Arrays | None = None) -> None:
        """Begin, with the ``heading`` that the newest version left, if any."""
        self._caps = {"weight_cap": settings.weight_cap, "length_cap": settings.length_cap}
        self._kept = settings.heading if settings.clients >= CLIENTS_MIN else 0.0
        # With dp of devices the middle of all would let one move what others count for; a sum has no single updates.
        if settings.dp.of_devices or settings.secure != PLAIN:
            self._caps = dict.fromkeys(self._caps, 0.0)
            self._kept = 0.0
        self._begin(heading or {})

    @property
    def devices(self) -> tuple[str, ...]:
        """Whose updates they are."""
        return tuple(self._found)

    def add(self, update: Update, strategy: Strategy) -> None:
        """Take an update that is in the sums."""
        length, agreement = 0.0, None
        if self._kept:
            way = _way(update, strategy)
            length = way.length
            if _tells(way, strategy):
                self._looks = True
                self._votes.add(*way)
                # a round of directions of its own is judged by itself, when all of it is there
                agreement = None if strategy.direction else self._heading.agreement(*way)
        if strategy.length or not self._kept:
            length = (strategy.length or length_of)(update) if self._caps["length_cap"] else 0.0
        self._found[update.device_id] = Measured(update.weight, length, agreement)

    def next_heading(self, strategy: Strategy, found: Mapping[str, Bound], arrived: Arrived) -> Arrays:
        """What the next version leaves of where the fleet went, float32 by tensor, and of who agreed; nothing if nobody looks.

        Who is far off has no vote; who points against the others has one, as they may be wrong.
        """
        if not self._kept or strategy.direction:
            return {}
        far = {device for device, bound in found.items() if not bound.scale and bound.agreement is None}
        for update in arrived() if far else ():
            if update.device_id in far and _tells(way := _way(update, strategy), strategy):
                self._votes.take_back(*way)
        recent = [*self._recent, *self._agreements][-RECENT_MAX:]
        left = self._votes.after(self._heading, kept=self._kept)
        return left | {_AGREEMENTS: np.array(recent, np.float32)}

    def begin(self, heading: Arrays) -> None:
        """Begin the next version with what the last one left."""
        self._begin(heading)

    def bounds(
        self, strategy: Strategy, reference: Arrays, arrived: Arrived, marks: Callable[[], Iterable[Mark]]
    ) -> dict[str, Bound]:
        """How those that are beyond the bounds count, by device.

        Args:
            strategy: of the version that is made.
            reference: the version that they are to move.
            arrived: the updates.
            marks: all that the job has noted of devices before, in order.
        """
        judged = self._judged(strategy, arrived) if len(self._found) >= UPDATES_MIN else self._found
        found = self._with_least(judged, marks)
        if strategy.length and self._caps["length_cap"]:
            return bounds(
                found,
                **{**self._caps, "length_cap": FEATURES_CAP, "far": FEATURES_CAP, "least": 1 / FEATURES_CAP},
            )
        floor = SMALL * norm_of(reference) if self._caps["length_cap"] else 0.0
        return bounds(found, **self._caps, floor=floor)

    def marks(self, found: Mapping[str, Bound], number: int, *, counts_all_alike: bool) -> Iterator[Mark]:
        """What is noted of them in a round; of one that ``counts_all_alike`` only who is left out elsewhere."""
        left_out = "" if counts_all_alike else "; left out"
        for device, bound in sorted(found.items()):
            told = self._found[device].weight
            if bound.scale and bound.weight < told and not counts_all_alike:
                yield mark(number, device, WEIGHT, f"weighs {bound.weight}; it told {told} samples")
            if 0 < bound.scale < 1 and not counts_all_alike:
                yield mark(
                    number,
                    device,
                    LENGTH,
                    f"{bound.times:.3g} times the middle length; scaled by {bound.scale:.3g}",
                )
            if bound.agreement is not None:
                said = f"points against where the others go (cosine {bound.agreement:.2f}){left_out}"
                yield mark(number, device, AGAINST, said)
            elif not bound.scale:
                yield mark(number, device, FAR, f"{bound.times:.3g} times the middle length{left_out}")

    def _begin(self, heading: Arrays) -> None:
        self._found: dict[str, Measured] = {}
        tensors = {name: value for name, value in heading.items() if name != _AGREEMENTS}
        self._votes, self._heading = Votes(), Heading(tensors)
        self._recent: list[float] = heading.get(_AGREEMENTS, np.zeros(0, np.float32)).tolist()
        self._agreements: list[float] = []
        """Those of the round that stand beside the recent ones, once it is judged."""
        self._looks = False
        """Whether any of them has a direction that is looked at: if not, none need be read again."""

    def _with_least(
        self, judged: Mapping[str, Measured], marks: Callable[[], Iterable[Mark]]
    ) -> Mapping[str, Measured]:
        """Measures with the agreement that each device must have: how spread the fleet is excuses who has no mark for it."""
        now = [one.agreement for _, one in sorted(judged.items()) if one.agreement is not None]
        # Cosines with the round's others are another kind than those with the heading: they stand for themselves.
        self._agreements = now if judged is self._found else []
        least = least_agreement([*self._recent, *now] if self._agreements else now)
        if not any(least <= one < -AGAINST_COSINE for one in now):
            return judged
        marked = _against(marks())
        return {d: one if d in marked else one._replace(least=least) for d, one in judged.items()}

    def _judged(self, strategy: Strategy, arrived: Arrived) -> Mapping[str, Measured]:
        """Measures with every agreement: with the round's others, where nothing is known of before, or the fleet has turned."""
        known = [one.agreement for one in self._found.values() if one.agreement is not None]
        turned = sum(one < -AGAINST_COSINE for one in known) > TURNED * len(self._found)
        if not self._looks or (len(known) == len(self._found) and not turned):
            return self._found
        total = self._votes.total()
        ways = ((one.device_id, _way(one, strategy)) for one in arrived())
        again = {device: total.agreement_of_others(*way) for device, way in ways if _tells(way, strategy)}
        return {
            device: one._replace(
                agreement=again.get(device) if turned or one.agreement is None else one.agreement
            )
            for device, one in self._found.items()
        }


def _against(marks: Iterable[Mark]) -> set[str]:
    """Devices that pointed against the others before, and are not pardoned."""
    found = set[str]()
    for one in marks:
        if one.kind == AGAINST:
            found.add(one.device)
        elif one.kind == PARDONED:
            found.discard(one.device)
    return found


def _way(update: Update, strategy: Strategy) -> _Way:
    direction = (strategy.direction or direction_of)(update)
    return _Way(direction, norm_of(direction))


def _tells(way: _Way, strategy: Strategy) -> bool:
    """Whether a cosine of it says something: it has elements enough, or directions of its own, as class sums have."""
    return bool(strategy.direction) or sum(moved.size for moved in way.direction.values()) >= ELEMENTS_MIN


def as_they_count(
    updates: Iterator[Update], found: Mapping[str, Bound], strategy: Strategy
) -> Iterator[Update]:
    """Updates held to their bounds, where they have one; without those that are left out."""
    hold = strategy.hold or held
    for update in updates:
        bound = found.get(update.device_id)
        if bound is None:
            yield update
        elif bound.scale:
            yield hold(update, bound)


def why_unwatched(settings: Settings) -> str:
    """Say why nobody's direction is looked at in a job that asks for it, and what helps; empty if it is, or need not be."""
    if not settings.heading or settings.strategy in OF_ALL:
        return ""
    help_ = "nothing but knowing the devices keeps it out (fleetune authority)"
    if settings.secure != PLAIN:
        why = "updates are only summed"
    elif settings.dp.of_devices:
        why = "noise of devices hides it"
    elif settings.clients < CLIENTS_MIN:
        why = f"{settings.clients} clients a round; among fewer than {CLIENTS_MIN} nobody can tell who goes astray"
        bounding = "--strategy median bounds one such device of three or four, --weight-cap 1 --length-cap 1 what it weighs"
        help_ = f"{bounding}; {help_}" if settings.clients > 2 else help_
    elif 0 < settings.num_elements < ELEMENTS_MIN:
        why = f"{settings.num_elements} elements; fewer than {ELEMENTS_MIN} point anywhere by chance"
    else:
        return ""
    counts = "a device that sends the opposite of what it learned counts as any other"
    return f"nobody's direction is looked at ({why}): {counts}; {help_}"
