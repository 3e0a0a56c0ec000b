"""Variable bitwidth: each device sends its update in the most bits that are in time on its link.

Source: arXiv 2209.10200 chooses who takes part and in how many bits, under a limit of delay, by reinforcement learning. Its
quantiser and estimator are not known to us. What is taken over is the bitwidth for each device under such a limit.

Ours: the limit is the round's deadline, less a tenth; without one, the time in which the middle device is done with 8 bits. The
link and the pace of training are as seen in rounds before. Whom none fits gets one bit; of whom nothing is known the job decides.
"""

from collections.abc import Sequence
from statistics import median

import msgspec

from fleetune.broker.methods.carrying import Carriage, Traffic
from fleetune.broker.methods.round_times import Pace, pace
from fleetune.broker.methods.seen import Fleet, Seen, blank, note
from fleetune.broker.tasks import Task
from fleetune.device_runtime.contracts.work import LocalWork

CODEC = "quant"
WIDTHS = (16, 8, 4, 2, 1)
USUAL = 8
"""Bits of the device that others are held to."""
MARGIN = 0.9
"""Share of a deadline that is used."""


def bits() -> Traffic:
    """Choose the up codec ``quant`` with bits by the link; the way down, and the first round of a device, are the job's."""

    def choose(fleet: Fleet, tasks: Sequence[Task], deadline_s: float) -> list[Carriage]:
        limit_s = MARGIN * deadline_s or usual_s(fleet, tasks[0].work)
        return [_carriage(fleet, task, limit_s) for task in tasks]

    return Traffic(blank, choose, note)


def usual_s(fleet: Fleet, work: LocalWork) -> float:
    """Seconds in which the middle device would do work with the usual bits; 0 where no pace and link are known."""
    paces = [
        found for seen in fleet.devices.values() if seen.up and (found := _pace(fleet, seen, work, USUAL))
    ]
    return median(one.total_s for one in paces) if paces else 0.0


def width(fleet: Fleet, seen: Seen, work: LocalWork, limit_s: float) -> int:
    """The most bits with which a device is done in time; 1 if none are few enough."""
    for bits in WIDTHS:
        found = _pace(fleet, seen, work, bits)
        if found and found.total_s <= limit_s:
            return bits
    return WIDTHS[-1]


def _pace(fleet: Fleet, seen: Seen, work: LocalWork, bits: int) -> Pace | None:
    elements = fleet.settings.num_elements
    return pace(seen, work, bytes_down=4 * elements, bytes_up=elements * bits / 8)


def _carriage(fleet: Fleet, task: Task, limit_s: float) -> Carriage:
    seen = fleet.devices.get(task.device_id)
    if seen is None or not (seen.sample_s and seen.up):
        return Carriage(task.work, None, "nothing known of its link")
    chosen = width(fleet, seen, task.work, limit_s)
    work = msgspec.structs.replace(task.work, codec=CODEC, codec_ratio=0.0, codec_bits=chosen)
    return Carriage(work, None, f"{chosen} bits: {seen.up / 1e3:.3g} kB/s, {limit_s:.3g} s")
