"""What stands in for an update that was asked for and did not come, around any strategy that averages whole tensors.

SAFARI (Mao et al., arXiv 2204.02321) makes up for lost updates by those of similar clients. Its equations are not public: what
is here is our reading of its abstract. A lost update of device i counts as that of the device whose update, of those that
came, is most like the last known one of i; ``own-last`` takes that last one itself, as MIFA (Gu et al., arXiv 2106.04159)
does. Either way every device that was asked keeps its weight, the samples that it told last, and who is lost more often does
not count for less. A device that nothing is known of is left out, which is plain averaging over those who came. SAFARI's
sparse training is no part of this.

What is known of devices is part of the strategy's state, durable with every version: of ``known_max`` devices, those heard
last (of equals the first by name).
"""

import math
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.exact_sums import Sums
from fleetune.broker.methods.strategy import Gathered, StandIn, Strategy, Update
from fleetune.device_runtime.arrays import Arrays, Floats
from fleetune.device_runtime.contracts.lora import place_of
from fleetune.device_runtime.draws import Key, integers

SKETCH = 256
"""Numbers of a sketch: 1 kB of state a device. The cosine of two is off by about 1 / 16."""
SKETCHES_MAX = 4096
"""Devices whose sketches are kept: 4 MB with every version."""
LAST_MAX = 64
"""Devices whose last updates are kept: so many adapters with every version."""

_HEARD = "heard"
"""Kind of state: int64 (2,), samples and the version that the device's update went into."""
Known = dict[str, Arrays]
"""What is known by device: ``heard``, and arrays of the rule's own."""


def safari(*, known_max: int = SKETCHES_MAX) -> Strategy:
    """FedAvg in which the most similar update of the round, by the cosine of sketches, stands in for a lost one.

    Source: arXiv 2204.02321, as read above. The sketch is ours: a whole last update of each device would be an adapter each.
    """
    return standing_in(fedavg(), _Rule(_sketched, _of_most_similar, known_max))


def own_last(*, known_max: int = LAST_MAX) -> Strategy:
    """FedAvg in which a device's own last difference, taken from the newest version, stands in for a lost update.

    Source: as MIFA, arXiv 2106.04159, which keeps the newest update of every device.
    """
    return standing_in(fedavg(), _Rule(_differences, _of_own, known_max))


class _Rule(NamedTuple):
    remember: Callable[[Update], Arrays]
    """(update) -> what is kept of it"""
    choose: Callable[[Gathered, Known, Known], Iterator[Update]]
    """(round, what was known, what is known of those who came) -> what stands in for the lost updates"""
    known_max: int


def standing_in(strategy: Strategy, rule: _Rule) -> Strategy:
    """Give a strategy stand-ins; its own state is what it would be without."""

    def stand_in(gathered: Gathered, state: Arrays) -> StandIn:
        known = _read(state)
        arrived = {u.device_id: _heard(u, gathered.version, rule) for u in gathered.updates()}
        kept = _newest({**known, **arrived}, rule.known_max)
        theirs = {name: value for name, value in state.items() if not _is_ours(name)}
        return StandIn(rule.choose(gathered, known, arrived), {**theirs, **_written(kept)})

    def finish(sums: Sums, reference: Arrays, state: Arrays) -> tuple[Arrays, Arrays]:
        ours = {name: value for name, value in state.items() if _is_ours(name)}
        new, kept = strategy.finish(sums, reference, {n: v for n, v in state.items() if n not in ours})
        return new, {**kept, **ours}

    return strategy._replace(finish=finish, stand_in=stand_in)


def sketch(update: Update) -> Floats:
    """Project the difference that an update makes on SKETCH numbers: each element is added to one of them, by a sign.

    Element i of a tensor is integer i under (0, ``sketch``, CRC-32 of its name): the last 8 bits are the place, bit 8 the sign.
    Inner products of sketches are right on average (Charikar, Chen and Farach-Colton, ICALP 2002).
    """
    total = np.zeros(SKETCH)
    for name, moved in sorted(_differences(update).items()):
        places, signs = _slots(name, moved.size)
        signed = signs * moved.astype(np.float64).reshape(-1)
        total += np.bincount(places, weights=signed, minlength=SKETCH)
    return total.astype(np.float32)


def cosine(one: Floats, other: Floats) -> float:
    """Cosine of two sketches, summed in their order; 0 where one is all zeros."""
    norms = math.sqrt(_product(one, one)) * math.sqrt(_product(other, other))
    return _product(one, other) / norms if norms else 0.0


def _of_most_similar(gathered: Gathered, known: Known, arrived: Known) -> Iterator[Update]:
    weights: dict[str, list[int]] = {}
    for device in gathered.lost:
        if device in known and arrived:
            mine = known[device]["sketch"].astype(np.float32)
            best = max(sorted(arrived), key=lambda d: cosine(mine, arrived[d]["sketch"].astype(np.float32)))
            weights.setdefault(best, []).append(_weight(known[device]))
    for update in gathered.updates() if weights else ():
        for weight in weights.get(update.device_id, ()):
            yield update._replace(weight=weight)


def _of_own(gathered: Gathered, known: Known, arrived: Known) -> Iterator[Update]:
    reference = gathered.reference
    for device in gathered.lost:
        last = {n: v for n, v in known.get(device, {}).items() if n in reference}
        if last:
            values = {
                n: np.asarray(np.float64(reference[n]) + np.float64(moved)) for n, moved in last.items()
            }
            yield Update(values, reference, _weight(known[device]), device_id=device)


def _sketched(update: Update) -> Arrays:
    return {"sketch": sketch(update)}


def _differences(update: Update) -> Arrays:
    """What an update changes, float32 in the shapes of its reference, by tensor."""
    return {name: _difference(name, value, update) for name, value in update.values.items()}


def _difference(name: str, value: NDArray[np.floating[Any]], update: Update) -> Floats:
    whole = np.asarray(update.reference[name], np.float64)
    place = place_of(name, update.rows[name]) if name in update.rows else ()
    moved = np.zeros(whole.shape, np.float32)
    moved[place] = (value - whole[place]).astype(np.float32)
    return moved


@lru_cache(maxsize=4096)
def _slots(name: str, size: int) -> tuple[NDArray[np.intp], NDArray[np.int8]]:
    drawn = integers(Key(0, "sketch", crc32(name.encode())), size)
    return (drawn % SKETCH).astype(np.intp), (1 - 2 * (drawn // SKETCH % 2)).astype(np.int8)


def _product(one: Floats, other: Floats) -> float:
    return float(np.cumsum(np.float64(one) * np.float64(other))[-1])


def _heard(update: Update, version: int, rule: _Rule) -> Arrays:
    return {_HEARD: np.array([update.weight, version], np.int64), **rule.remember(update)}


def _weight(known: Arrays) -> int:
    return int(known[_HEARD].astype(np.int64)[0])


def _newest(known: Known, known_max: int) -> Known:
    order = sorted(known, key=lambda device: (-int(known[device][_HEARD].astype(np.int64)[1]), device))
    return {device: known[device] for device in sorted(order[:known_max])}


def _is_ours(name: str) -> bool:
    """Whether state is about a device: ``DEVICE KIND``; no tensor and no device has a blank in its name."""
    return " " in name


def _read(state: Mapping[str, NDArray[np.generic]]) -> Known:
    known: Known = {}
    for name in filter(_is_ours, state):
        device, kind = name.split(" ", 1)
        known.setdefault(device, {})[kind] = state[name]
    return known


def _written(known: Known) -> Arrays:
    return {f"{device} {kind}": value for device, arrays in known.items() for kind, value in arrays.items()}
