"""What a job is, fixed for its life."""

from typing import Annotated

import msgspec

from fleetune.broker.jobs.privacy import Privacy
from fleetune.device_runtime.contracts.class_means import ClassHead
from fleetune.device_runtime.contracts.codecs import EXACT
from fleetune.device_runtime.contracts.fields import (
    COUNT_MAX,
    FIGURE_MAX,
    NEIGHBOURS_MAX,
)
from fleetune.device_runtime.contracts.work import (
    FULL,
    HEAD_STARTS,
    WHOLE,
    LocalWork,
    SumGrid,
)
from fleetune.device_runtime.draws import SEED_MAX
from fleetune.device_runtime.options import Option, values_of

FIXED, AUTO = "fixed", "auto"
"""Configurators: all devices as the job says, and the one that chooses each device's policy; as a policy, short for that one."""
PLAIN, ON_GRID, MASKS = SECURES = ("no", "grid", "masks")
"""How much an aggregator learns of one update: all; all, rounded to the grid; nothing but the sum of all of them."""
MASK_SHARE = 0.1
"""Share of the elements that a mask keeps, unless the job says another."""
PATIENT = ("rounds", "strikes")
"""Settings that are no part of what a job is: a later start may give others."""
_SIZES = ("num_layers", "num_elements", "num_classes", "score")
"""What follows from the artifact, and is 0 in ledgers that do not say."""
_NO_HEAD = ClassHead()
_NO_GRID = SumGrid()


class Job(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A job as the operator gives it: ``Job("home", rounds=20, clients=8)``."""

    job: Annotated[
        str, Option("name of the federation; all devices and the aggregator say the same", metavar="NAME")
    ]
    rounds: Annotated[
        int, Option("rounds in all; a later start may ask for more, or fewer", at_least=1, at_most=COUNT_MAX)
    ]
    clients: Annotated[int, Option("training devices in a round; of more, so many are drawn", at_least=1)]
    min_clients: Annotated[
        int, Option("updates a round needs at its deadline; 0 for all of --clients", at_least=0)
    ] = 0
    strategy: Annotated[str, Option("how updates are combined", table="strategy")] = "fedavg"
    down_codec: Annotated[
        str,
        Option(
            "how a version is packed for a device that holds an earlier one; full: to the bit, as a difference where that "
            "is shorter; whole: always whole",
            table="codec",
            choices=(FULL, WHOLE),
        ),
    ] = FULL
    down_ratio: Annotated[
        float,
        Option("topk, caesar: share of the elements that is sent down; 0 for all others", at_least=0),
    ] = 0.0
    down_bits: Annotated[
        int,
        Option(
            "bits of a value that is sent down, where the codec has a choice; 0 for the codec's own",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    lazy: Annotated[
        float,
        Option(
            "codec innovation: a device whose update is this much less new than the model's last moves sends none, and "
            "its last one counts again; 0 for never",
            at_least=0,
            at_most=FIGURE_MAX,
        ),
    ] = 0.0
    mask_share: Annotated[
        float, Option("mask consensus: share of all elements that travels", above=0, at_most=1)
    ] = MASK_SHARE
    mask_every: Annotated[
        int,
        Option(
            "mask consensus: rounds from one vote to the next, 2 or more; 0 for one vote, in the first round",
            at_least=0,
        ),
    ] = 0
    seed: Annotated[int, Option("seed of everything random", at_least=0, below=SEED_MAX + 1)] = 0
    selection: Annotated[str, Option("which of the devices here are asked", table="selection")] = "uniform"
    configurator: Annotated[str, Option("how the work of each device is chosen", table="configurator")] = (
        FIXED
    )
    traffic: Annotated[
        str, Option("how what each device sends and is sent is packed", table="traffic planner")
    ] = FIXED
    compress_down: Annotated[
        float,
        Option(
            "traffic caesar: largest share of the elements that are not sent down exactly",
            at_least=0,
            below=1,
        ),
    ] = 0.6
    compress_up: Annotated[
        float,
        Option("traffic caesar: largest share of the elements that are not sent up", at_least=0, below=1),
    ] = 0.6
    compress_up_min: Annotated[
        float,
        Option("traffic caesar: smallest share of the elements that are not sent up", at_least=0, below=1),
    ] = 0.1
    explore: Annotated[
        str,
        Option("configurator auto: how it tries out what it does not know", choices=("epsilon", "ucb")),
    ] = "epsilon"
    evaluate_every: Annotated[
        int, Option("versions evaluated: 0, every so many, and the last", at_least=1)
    ] = 1
    head_start: Annotated[
        str,
        Option(
            "what the head begins with; class-mean: the first round asks every training device for its class sums",
            choices=HEAD_STARTS,
        ),
    ] = "none"
    weight_cap: Annotated[
        float,
        Option(
            "most that an update of a round weighs, in times the middle one; from 1, 0 for no bound",
            at_least=0,
            at_most=FIGURE_MAX,
        ),
    ] = 3.0
    length_cap: Annotated[
        float,
        Option(
            "most that an update moves the model, in times the middle one of its round; 10 times is left out; from 1, 0 for no "
            "bound",
            at_least=0,
            at_most=FIGURE_MAX,
        ),
    ] = 5.0
    heading: Annotated[
        float,
        Option(
            "share of where the fleet went that still counts in the next round: an update that points against it is left out, "
            "and one that does not agree counts no more than the middle one; 0: no update's direction is looked at",
            at_least=0,
            below=1,
        ),
    ] = 0.8
    outliers: Annotated[
        float,
        Option(
            "trimmed, krum, multi-krum: share of a round's updates that may be wrong", at_least=0, below=0.5
        ),
    ] = 0.2
    strikes: Annotated[
        int,
        Option(
            "updates refused as implausible, far off or against all others, in 20 rounds after which a device is not asked for "
            "20 more; 0 for any number",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 3
    dp: Privacy = Privacy()
    secure: Annotated[
        str,
        Option(
            "masks: the aggregator learns the sum of a round's updates and none of them; grid: the same numbers without masks",
            choices=SECURES,
        ),
    ] = PLAIN
    secure_bits: Annotated[int, Option("secure: bits of an element's change", at_least=2, at_most=24)] = 16
    secure_range: Annotated[
        float, Option("secure: largest change of an element; a larger one is cut", above=0, at_most=1e6)
    ] = 1.0
    secure_weight_bits: Annotated[
        int,
        Option(
            "secure: bits of a device's samples as its weight, more count as the most; 0: all devices count the same",
            at_least=0,
            at_most=20,
        ),
    ] = 10
    secure_threshold: Annotated[
        float,
        Option(
            "secure masks: share of a device and its neighbours that can take its mask off, more than half",
            above=0.5,
            at_most=1,
        ),
    ] = 0.6
    secure_neighbours: Annotated[
        int,
        Option(
            "secure masks: devices that each one masks with; 0 for 128, or all where they are fewer",
            at_least=0,
            at_most=NEIGHBOURS_MAX,
        ),
    ] = 0


class Settings(Job, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A job of an artifact with its work. The ledger keeps it and refuses to go on with another, but for what is PATIENT."""

    artifact: str
    """SHA-256 of the artifact's manifest."""
    work: LocalWork = LocalWork()
    head: ClassHead = _NO_HEAD
    """What the round for the head fills; blank without one."""
    num_layers: int = 0
    """Of the artifact's model; 0 in ledgers of earlier releases: not known."""
    num_elements: int = 0
    """Of its adapter; 0: not known."""
    num_classes: int = 0
    """Of its classes; 0: not known, or none."""
    score: str = ""
    """What its devices tell as ``accuracy``, one of SCORES; empty where nobody has said."""
    still: tuple[str, ...] = ()
    """Tensors that the work never trains, of a job with differential privacy: they get no noise."""

    @property
    def head_rounds(self) -> int:
        """Rounds for the head, before those that train."""
        return int(self.head_start == "class-mean")

    @property
    def grid(self) -> SumGrid:
        """What updates are whole numbers on; blank if they are none."""
        if self.secure == PLAIN:
            return _NO_GRID
        return SumGrid(
            bits=self.secure_bits,
            weight_bits=self.secure_weight_bits,
            summands=self.clients,
            limit=self.secure_range,
        )

    @property
    def is_lossy_up(self) -> bool:
        """Whether updates lose bits on their way, or may: a traffic planner chooses."""
        return self.secure != PLAIN or self.traffic != FIXED or self.work.codec not in EXACT

    @property
    def is_lossy(self) -> bool:
        """Whether anything does, in either direction."""
        return self.is_lossy_up or self.down_codec not in (FULL, WHOLE, *EXACT)


def differences(mine: Settings, theirs: Settings) -> list[str]:
    """Fields that make of two settings two jobs, as 'clients: 4, was 3', and of their work as 'work.optimizer.lr'."""
    left, right = values_of(mine), values_of(theirs)
    names = [name for name in left if name not in PATIENT and left[name] != right[name]]
    unsaid = [name for name in _SIZES if not (left[name] and right[name])]
    names = [name for name in names if name not in unsaid]
    return [f"{name}: {left[name]!r}, was {right[name]!r}" for name in names]
