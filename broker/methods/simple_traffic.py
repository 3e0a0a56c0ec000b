"""Planners to compare Caesar's with, each one rule of what another paper is remembered to do: none is that paper's system.

FlexCom (Li et al., INFOCOM 2021) compresses a device's update by its own conditions: here ``topk`` by the rank of its uplink.
ProWD (Yoon et al., ICML 2022) has devices of unequal bitwidths: here ``quant`` with bits by that rank, without its way of
dequantising. PyramidFL (Li et al., MobiCom 2022) has devices of less utility send less: here ``topk`` by the rank of samples
times loss; whom to select, and how many steps each does, is left out. All are from memory, not from the texts; shares and
widths are Caesar's and ours. The way down is the job's.
"""

import math
from collections.abc import Callable, Mapping, Sequence

import msgspec

from fleetune.broker.methods.caesar import up_share
from fleetune.broker.methods.carrying import Carriage, Traffic
from fleetune.broker.methods.seen import Fleet, Seen, blank, note, places
from fleetune.broker.tasks import Task
from fleetune.device_runtime.contracts.work import LocalWork

WIDTHS = (16, 8, 4, 2)
"""From the best quarter of the devices to the last."""

Worth = Callable[[Seen], float]
Pack = Callable[[Fleet, float, LocalWork], LocalWork]
"""(fleet, place from 0, the first, to 1, the last, work) -> work with its up codec"""


def ranked(worth: Worth, pack: Pack, *, chooses: tuple[str, ...]) -> Traffic:
    """Pack what a device sends by its place among all that ever took part; one that did not is in the middle."""

    def choose(fleet: Fleet, tasks: Sequence[Task], deadline_s: float) -> list[Carriage]:
        at = places({name: worth(seen) for name, seen in fleet.devices.items()})
        found = [(task, at.get(task.device_id, 0.5)) for task in tasks]
        return [
            Carriage(pack(fleet, place, task.work), None, f"at {place:.2g} of all known")
            for task, place in found
        ]

    return Traffic(blank, choose, note, chooses=chooses)


def by_uplink(seen: Seen) -> float:
    """The quicker its link, the better."""
    return seen.up


def by_utility(seen: Seen) -> float:
    """Samples times loss, as Oort's statistical utility with the mean loss for each sample's."""
    return seen.num_samples * seen.loss


def sparse(fleet: Fleet, place: float, work: LocalWork) -> LocalWork:
    """Send a share of the elements, between the job's two bounds."""
    return msgspec.structs.replace(work, codec="topk", codec_ratio=1 - up_share(fleet, place))


def few_bits(fleet: Fleet, place: float, work: LocalWork) -> LocalWork:
    """Send all elements, with the bits of a quarter of the devices."""
    bits = WIDTHS[max(math.ceil(place * len(WIDTHS)), 1) - 1]
    return msgspec.structs.replace(work, codec="quant", codec_ratio=0.0, codec_bits=bits)


SIMPLE: Mapping[str, Callable[[], Traffic]] = {
    "flexcom-like": lambda: ranked(by_uplink, sparse, chooses=("codec", "codec_ratio")),
    "prowd-like": lambda: ranked(by_uplink, few_bits, chooses=("codec", "codec_ratio", "codec_bits")),
    "pyramidfl-like": lambda: ranked(by_utility, sparse, chooses=("codec", "codec_ratio")),
}
