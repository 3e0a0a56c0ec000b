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
from fleetune.broker.methods.paces import Pace, pace
from fleetune.broker.methods.seen import Fleet, Seen, blank, note
from fleetune.broker.tasks import Packing, Task
from fleetune.device_runtime.contracts.wire import FULL

DOWN_CODEC, UP_CODEC = "topk", "topk"
DOWN_MAX, UP_MIN, UP_MAX = 0.6, 0.1, 0.6
"""Shares that are compressed."""
LAMBDA = 0.5
"""What the number of samples counts for, beside their labels."""
WINDOW = 20
"""Rounds after which ``caesar-window`` sends the whole."""
BATCH_MIN = 0.25
"""Of the job's batch."""
_CHOSEN = ("codec", "codec_ratio", "codec_bits", "down_codec", "down_ratio", "down_bits")

Staleness = Callable[[int, int], float]
"""(rounds since a device last took part, round from 1) -> share that is compressed; those two are equal if it never did"""


def caesar(*, down: Staleness | None = None, by_importance: bool = True, has_batches: bool = True) -> Traffic:
    """Pack by staleness, by default :func:`linear`, and by importance; any part may be taken out."""
    staleness = down or linear

    def choose(fleet: Fleet, tasks: Sequence[Task], deadline_s: float) -> list[Carriage]:
        shares = up_shares(fleet) if by_importance else {}
        chosen = [_carriage(fleet, task, staleness, shares) for task in tasks]
        return with_batches(fleet, tasks, chosen) if has_batches else chosen

    return Traffic(blank, choose, note, chooses=_CHOSEN, hears_labels=by_importance)


def linear(away: int, number: int) -> float:
    """The paper's: over all rounds so far."""
    return DOWN_MAX * (1 - min(away / max(number, 1), 1.0))


def windowed(away: int, number: int) -> float:
    """Ours: over a window, or over all rounds while they are fewer."""
    return linear(away, min(number, WINDOW))


def halfway(away: int, number: int) -> float:
    """Half of the largest share for every device that took part before: a control."""
    return DOWN_MAX / 2 if away < number else 0.0


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
    worth = {name: importance(seen, num_samples_max=largest) for name, seen in sorted(fleet.devices.items())}
    ranked = sorted(worth, key=lambda name: -worth[name])
    return {name: UP_MIN + (UP_MAX - UP_MIN) * rank / len(ranked) for rank, name in enumerate(ranked, 1)}


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
        32.0 if down is None or down.codec == FULL else 2 + 32 * down.ratio
    )  # kept values, their map, signs
    bits_up = 1 + 16 * carriage.work.codec_ratio  # halves, their map
    one = pace(
        fleet.devices.get(task.device_id),
        carriage.work,
        bytes_down=elements * bits_down / 8,
        bytes_up=elements * bits_up / 8,
    )
    return one if task.work.steps else None


def _carriage(fleet: Fleet, task: Task, staleness: Staleness, shares: Mapping[str, float]) -> Carriage:
    seen = fleet.devices.get(task.device_id)
    away = task.round - (seen.round if seen else 0)
    down = min(max(staleness(away, task.round), 0.0), DOWN_MAX)
    up = shares.get(task.device_id, (UP_MIN + UP_MAX) / 2)
    asks = task.work.histogram and (seen is None or seen.histogram is None)
    work = msgspec.structs.replace(
        task.work, codec=UP_CODEC, codec_ratio=1 - up, codec_bits=0, histogram=asks
    )
    packing = Packing(DOWN_CODEC, 1 - down) if down else Packing(FULL)
    since = f"{away} rounds away" if seen else "never here"
    return Carriage(work, packing, f"{since}: {1 - down:.2g} down, {1 - up:.2g} up")


CAESARS: Mapping[str, Callable[[], Traffic]] = {
    "caesar": caesar,
    "caesar-window": lambda: caesar(down=windowed),
    "caesar-fixed-ratio": lambda: caesar(down=halfway),
    "caesar-uniform": lambda: caesar(by_importance=False),
    "caesar-one-batch": lambda: caesar(has_batches=False),
}
"""The planner, and what it is without one of its parts."""
