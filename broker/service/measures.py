"""What the bounds of a round go by, as its updates come, and what is noted of those that are beyond them."""

from collections.abc import Iterator, Mapping

from fleetune.broker.job import PLAIN, Settings
from fleetune.broker.methods.bounds import Measured, bounds, held, length_of, norm_of
from fleetune.broker.methods.strategy import Bound, Strategy, Update
from fleetune.broker.tasks import FAR, LENGTH, WEIGHT, Mark, mark
from fleetune.device_runtime.arrays import Arrays

FEATURES_CAP = 2.0
"""Class sums of features this many times longer or shorter than the middle ones are left out: one model makes all of them."""

SMALL = 0.001
"""No update is long that moves less than this share of the version's norm, however short the others are."""


class Measures:
    """Of the updates that make the next version."""

    def __init__(self, settings: Settings) -> None:
        self._caps = {"weight_cap": settings.weight_cap, "length_cap": settings.length_cap}
        # With dp of devices the middle of all would let one move what others count for; a sum has no single updates.
        if settings.dp.of_devices or settings.secure != PLAIN:
            self._caps = dict.fromkeys(self._caps, 0.0)
        self._found: dict[str, Measured] = {}

    @property
    def devices(self) -> tuple[str, ...]:
        """Whose updates they are."""
        return tuple(self._found)

    def add(self, update: Update, strategy: Strategy) -> None:
        """Take an update that is in the sums."""
        length = (strategy.length or length_of)(update) if self._caps["length_cap"] else 0.0
        self._found[update.device_id] = Measured(update.weight, length)

    def clear(self) -> None:
        """Begin the next version."""
        self._found.clear()

    def bounds(self, strategy: Strategy, reference: Arrays) -> dict[str, Bound]:
        """How those that are beyond the bounds count, by device; ``reference`` is the version that they are to move."""
        if strategy.length and self._caps["length_cap"]:
            return bounds(
                self._found,
                **{**self._caps, "length_cap": FEATURES_CAP, "far": FEATURES_CAP, "least": 1 / FEATURES_CAP},
            )
        floor = SMALL * norm_of(reference) if self._caps["length_cap"] else 0.0
        return bounds(self._found, **self._caps, floor=floor)

    def marks(self, found: Mapping[str, Bound], number: int, *, counts_all_alike: bool) -> Iterator[Mark]:
        """What is noted of them in a round; of one that ``counts_all_alike`` only who is far off."""
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
            if not bound.scale:
                left_out = "" if counts_all_alike else "; left out"
                yield mark(number, device, FAR, f"{bound.times:.3g} times the middle length{left_out}")


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
