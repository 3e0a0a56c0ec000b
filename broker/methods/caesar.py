"""Caesar: a device is sent the more exactly the longer it was away, and sends the more the more its data are worth.

Source: Yan, Liu, Xu, Huang, Gong, Liu and Hou, arXiv 2412.19989. The paper's: the share of parameters that is compressed falls
from its largest to none with the rounds since a device last took part, over all rounds so far; that of what it sends goes by the
rank of its importance, made of the samples' number and of how far its labels are from a reference; batch sizes let all finish
with the fastest. That rank and the defaults we know from others' code alone (nclabteam/FedProC).

Ours: the formula of the importance, with the uniform distribution as the reference and counts raised by one; the rank is one over
all devices that ever took part, and a device that never did is in the middle; the batch is at least a quarter of the job's, and
the learning rate stays; ``caesar-window``: over so many rounds, not all.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from fleetune.broker.methods.carrying import Carriage, Traffic
from fleetune.broker.methods.round_times import Pace, pace
from fleetune.broker.methods.seen import Fleet, Seen, blank, note, places
from fleetune.broker.tasks import Packing, Task
from fleetune.device_runtime.contracts.work import FULL

DOWN_CODEC, UP_CODEC = "caesar", "topk"
LAMBDA = 0.5
"""What the number of samples counts for, beside their labels."""
WINDOW = 20
"""Rounds after which ``caesar-window`` sends the whole."""
BATCH_MIN = 0.25
"""Of the job's batch."""
_CHOSEN = ("codec", "codec_ratio", "down_codec", "down_ratio")

Staleness = Callable[[int, int], float]
"""(rounds since a device last took part, round from 1) -> part of the largest share; those two are equal if it never did"""


def caesar(
    *,
    down: Staleness | None = None,
    down_codec: str = DOWN_CODEC,
    by_importance: bool = True,
    has_batches: bool = True,
) -> Traffic:
    """Pack by staleness, by default :func:`linear`, and by importance; any part may be taken out. Bits are the job's."""
    staleness = down or linear

    def choose(fleet: Fleet, tasks: Sequence[Task], deadline_s: float) -> list[Carriage]:
        shares = up_shares(fleet) if by_importance else {}
        chosen = [
            _carriage(fleet, task, shares.get(task.device_id), _down(fleet, task, staleness, down_codec))
            for task in tasks
        ]
        return with_batches(fleet, tasks, chosen) if has_batches else chosen

    return Traffic(blank, choose, note, chooses=_CHOSEN, hears_labels=by_importance)


def linear(away: int, number: int) -> float:
    """The paper's: over all rounds so far."""
    return 1 - min(away / max(number, 1), 1.0)


def windowed(away: int, number: int) -> float:
    """Ours: over a window, or over all rounds while they are fewer."""
    return linear(away, min(number, WINDOW))


def halfway(away: int, number: int) -> float:
    """Half for every device that took part before: a control."""
    return 0.5 if away < number else 0.0


def importance(seen: Seen, *, num_samples_max: int) -> float:
    """What a device's data are worth, 0 to 1; by their number alone where its labels are not known.

    lambda n / max n + (1 - lambda) exp(-KL(labels || uniform)).
    """
    volume = seen.num_samples / max(num_samples_max, 1)
    if not seen.histogram:
        return volume
    return LAMBDA * volume + (1 - LAMBDA) * math.exp(-divergence(seen.histogram))


def divergence(histogram: Sequence[int]) -> float:
    """KL of a label distribution, each count raised by one, from the uniform one; nats."""
    counts = [count + 1 for count in histogram]
    total = sum(counts)
    return max(sum(n / total * math.log(n / total * len(counts)) for n in counts), 0.0)


def up_shares(fleet: Fleet) -> dict[str, float]:
    """The share that is compressed of what each known device sends: the least important device has the largest."""
    largest = max((seen.num_samples for seen in fleet.devices.values()), default=0)
    worth = {name: importance(seen, num_samples_max=largest) for name, seen in fleet.devices.items()}
    return {name: up_share(fleet, place) for name, place in places(worth).items()}


def up_share(fleet: Fleet, place: float) -> float:
    """The share at a place between the most important device, 0, and the least, 1."""
    low, high = fleet.settings.compress_up_min, fleet.settings.compress_up
    return low + (high - low) * place


def with_batches(fleet: Fleet, tasks: Sequence[Task], chosen: Sequence[Carriage]) -> list[Carriage]:
    """Lower the batches of those who would be later than the first of them: of work in steps, and where paces are known."""
    paces = [_pace(fleet, task, carriage) for task, carriage in zip(tasks, chosen, strict=True)]
    first_s = min((one.total_s for one in paces if one), default=0.0)
    return [
        _with_batch(carriage, (first_s - one.carried_s) / one.trained_s) if one else carriage
        for one, carriage in zip(paces, chosen, strict=True)
    ]


def _with_batch(carriage: Carriage, share: float) -> Carriage:
    size = carriage.work.batch_size
    fitting = min(max(math.floor(share * size + 1e-9), math.ceil(BATCH_MIN * size)), size)
    return carriage._replace(work=msgspec.structs.replace(carriage.work, batch_size=fitting))


def _pace(fleet: Fleet, task: Task, carriage: Carriage) -> Pace | None:
    down, elements = carriage.down, fleet.settings.num_elements
    bits_down = (
        32.0 if down is None or down.codec == FULL else 2 + (down.bits or 32) * down.ratio
    )  # with map and signs
    bits_up = 1 + (carriage.work.codec_bits or 16) * carriage.work.codec_ratio  # with their map
    one = pace(
        fleet.devices.get(task.device_id),
        carriage.work,
        bytes_down=elements * bits_down / 8,
        bytes_up=elements * bits_up / 8,
    )
    return one if task.work.steps else None


def _carriage(fleet: Fleet, task: Task, share: float | None, down: Packing) -> Carriage:
    seen = fleet.devices.get(task.device_id)
    ratio = 1 - (up_share(fleet, 0.5) if share is None else share)
    asks = task.work.histogram and (seen is None or seen.histogram is None)
    work = msgspec.structs.replace(task.work, codec=UP_CODEC, codec_ratio=ratio, histogram=asks)
    since = f"{task.round - seen.round} rounds away" if seen else "never here"
    return Carriage(work, down, f"{since}: {down.ratio or 1:.2g} down, {ratio:.2g} up")


def _down(fleet: Fleet, task: Task, staleness: Staleness, codec: str) -> Packing:
    """How the version is packed for a device: the whole if it never took part."""
    seen, settings = fleet.devices.get(task.device_id), fleet.settings
    away = task.round - (seen.round if seen else 0)
    share = settings.compress_down * staleness(away, task.round)
    return Packing(codec, 1 - share, settings.down_bits) if share else Packing(FULL)


CAESARS: Mapping[str, Callable[[], Traffic]] = {
    "caesar": caesar,
    "caesar-window": lambda: caesar(down=windowed),
    "caesar-fixed-ratio": lambda: caesar(down=halfway),
    "caesar-sign": lambda: caesar(down_codec="caesar-sign"),
    "caesar-zero": lambda: caesar(down_codec="caesar-zero"),
    "caesar-uniform": lambda: caesar(by_importance=False),
    "caesar-one-batch": lambda: caesar(has_batches=False),
}
"""The planner, and what it is without one of its parts: recovery from stale values is that of its down codec."""
