"""What a job is, fixed for its life, and how patient the aggregator is, which a restart may change."""

import math
from pathlib import Path
from typing import Annotated, Any

import msgspec

from fleetune.device_runtime.contracts.class_means import ClassHead
from fleetune.device_runtime.contracts.codecs import EXACT
from fleetune.device_runtime.contracts.fields import (
    COUNT_MAX,
    FIGURE_MAX,
    NEIGHBOURS_MAX,
    SECONDS_MAX,
    check_name,
)
from fleetune.device_runtime.contracts.work import (
    ADAPTER,
    CLASS_MEANS,
    FULL,
    GRID,
    HEAD_STARTS,
    MASKED,
    WHOLE,
    LocalWork,
    PolicySpec,
    SumGrid,
)
from fleetune.device_runtime.draws import SEED_MAX, Key, integers
from fleetune.device_runtime.errors import ConfigError, one_line
from fleetune.device_runtime.options import Option, values_of

FIXED, AUTO = "fixed", "auto"
"""Configurators: all devices as the job says, and the one that chooses each device's policy; as a policy, short for that one."""
PLAIN, ON_GRID, MASKS = SECURES = ("no", "grid", "masks")
"""How much an aggregator learns of one update: all; all, rounded to the grid; nothing but the sum of all of them."""
HELD_OUT = 0.1
"""Share of a device's samples that it measures on, unless the job says another."""
MASK_SHARE = 0.1
"""Share of the elements that a mask keeps, unless the job says another."""
UPLOADS_MB = 256.0
"""Updates that are fetched at once, unless the operator says otherwise: what they take of the memory."""
PATIENT = ("rounds", "strikes")
"""Settings that are no part of what a job is: a later start may give others."""
_SIZES = ("num_layers", "num_elements", "num_classes", "score")
"""What follows from the artifact, and is 0 in ledgers that do not say."""
_EXACT = "xor"
"""The codec of class sums, whatever the job's: sums of classes that a device does not have, and bits that they do not have,
cost next to nothing."""
OF_DEVICES = (
    *("seed", "rounds_before", "rows_seed", "sums_bits", "most_norm", "noise"),
    *("sample_clip", "sample_noise", "sample_rate"),
)
"""Fields of the work that each device of each round gets of its own, or the job says elsewhere."""
SUMS_BITS, SUMS_BITS_OF_HALF, _HALF = 4, 10, 16
"""Bits of the significand of a class sum: in a job that packs up in few bits, and in one that packs in half precision."""
_NO_HEAD = ClassHead()
NO_PRIVACY, CENTRAL, DISTRIBUTED, LOCAL, SAMPLE = PRIVACIES = (
    *("none", "central", "distributed", "local"),
    "sample",
)
"""Where the noise of differential privacy is added; with the last one in each step of each device."""
_NOISE_MAX = 1e6


class Privacy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Differential privacy: what a job's versions may tell of any one device, or of any one sample of a device."""

    name: Annotated[
        str,
        Option(
            "where noise hides what one device adds: at the aggregator, in the shares of a round's devices together, or in "
            "each device's own update; sample: in each step, where it hides what one sample adds",
            table="dp",
        ),
    ] = NO_PRIVACY
    clip: Annotated[
        float,
        Option(
            "with dp: L2 norm of the change of one update, or of one sample's gradient, at most",
            at_least=0,
            at_most=_NOISE_MAX,
        ),
    ] = 0.0
    noise: Annotated[
        float,
        Option("with dp: standard deviation of the noise, in clip", at_least=0, at_most=_NOISE_MAX),
    ] = 0.0
    sample_rate: Annotated[
        float,
        Option(
            "dp sample: chance of each sample to be in a step, in place of batch_size", at_least=0, at_most=1
        ),
    ] = 0.0
    delta: Annotated[
        float,
        Option(
            "with dp: chance that epsilon does not hold; less than 1 in so many devices, or samples",
            above=0,
            below=1,
        ),
    ] = 1e-5
    most_epsilon: Annotated[
        float,
        Option(
            "with dp: a device whose next round would exceed this is asked no more, and the job ends when too few are left; "
            "0 for no limit",
            at_least=0,
            at_most=_NOISE_MAX,
        ),
    ] = 0.0

    @property
    def is_on(self) -> bool:
        """Whether there is any."""
        return self.name != NO_PRIVACY

    @property
    def of_samples(self) -> bool:
        """Whether each sample of a device is hidden, and not the device."""
        return self.name == SAMPLE

    @property
    def of_devices(self) -> bool:
        """Whether each device is hidden, with all of its samples."""
        return self.is_on and not self.of_samples

    @property
    def is_central(self) -> bool:
        """Whether the aggregator adds the noise."""
        return self.name == CENTRAL

    def device_noise(self, min_clients: int) -> float:
        """Noise that each device adds, in ``clip``: all of it, its share of it where so many are together, or none."""
        if self.name == LOCAL:
            return self.noise
        return self.noise / math.sqrt(max(1, min_clients)) if self.name == DISTRIBUTED else 0.0

    def asked(self, work: LocalWork, min_clients: int) -> LocalWork:
        """Say in ``work`` what a device has to do for it."""
        if self.of_samples:
            return msgspec.structs.replace(
                work, sample_clip=self.clip, sample_noise=self.noise, sample_rate=self.sample_rate
            )
        return msgspec.structs.replace(work, most_norm=self.clip, noise=self.device_noise(min_clients))


_NO_GRID = SumGrid()
_CODECS = {ON_GRID: GRID, MASKS: MASKED}
"""Of a job's updates that are summed."""


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


class Patience(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How long the aggregator waits for what, how much it holds (updates on their way), and how much of the past it keeps."""

    deadline_s: Annotated[
        float,
        Option(
            "seconds after which a round closes, or is extended by as much; 0 for never",
            at_least=0,
            at_most=SECONDS_MAX,
        ),
    ] = 600.0
    grace_s: Annotated[
        float,
        Option(
            "seconds that a round which has min_clients updates waits for devices that are gone, once all others have answered",
            at_least=0,
            at_most=SECONDS_MAX,
        ),
    ] = 10.0
    gather_s: Annotated[
        float, Option("seconds the first round waits for all clients, then for min_clients", at_least=0)
    ] = 60.0
    evaluation_s: Annotated[
        float,
        Option("seconds to wait for the next report after the last round; 0 for ever", at_least=0),
    ] = 600.0
    secure_s: Annotated[
        float,
        Option(
            "secure masks: seconds to wait for keys, and for shares, of who is slow",
            above=0,
            at_most=SECONDS_MAX,
        ),
    ] = 60.0
    extensions_max: Annotated[
        int, Option("extensions of one round before the aggregator stops", at_least=0)
    ] = 10
    uploads_mb: Annotated[
        float,
        Option(
            "MB (10^6 bytes) of updates that are fetched at once, by their announced sizes; one always is",
            above=0,
        ),
    ] = UPLOADS_MB
    share: Annotated[
        bool,
        Option(
            "publish what several devices fetch at the same time once for all of them, or send it to each",
            off="no-share",
        ),
    ] = True
    keep_versions: Annotated[
        int, Option("newest versions whose files stay, beside version 0; 0 for all", at_least=0)
    ] = 64
    keep_rounds: Annotated[
        int,
        Option(
            "newest rounds of which all is known by device, and as many lines on those before; 0 for all",
            at_least=0,
        ),
    ] = 1000


class Members(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which devices may do what; every start may say something else."""

    evaluators: Annotated[
        str,
        Option(
            "the devices that may evaluate, separated by commas, or a file with one a line; without it all that say so",
            metavar="NAMES",
        ),
    ] = ""
    pardon: Annotated[
        str,
        Option("devices, separated by commas, whose marks are forgiven at this start", metavar="NAMES"),
    ] = ""


def names_in(said: str) -> tuple[str, ...]:
    """Return the devices of a list with commas, or of a file of that name with one a line; all different, in their order.

    Raises:
        ConfigError: a name that no device can have, or a file that cannot be read.
    """
    path = Path(said)
    try:
        text = path.read_text(encoding="utf-8") if said and path.is_file() else said.replace(",", "\n")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{said}: cannot be read: {one_line(exc)}") from exc
    names = dict.fromkeys(line.strip() for line in text.splitlines() if line.strip())
    return tuple(check_name("device", name) for name in names)


def settings_of(
    job: Job,
    *,
    artifact: str,
    work: LocalWork,
    num_layers: int = 0,
    num_elements: int = 0,
    num_classes: int = 0,
    score: str = "",
    head: ClassHead = _NO_HEAD,
    still: tuple[str, ...] = (),
) -> Settings:
    """Join a job, the digest of its artifact, its sizes, its work, its head and its still tensors.

    ``min_clients`` 0 becomes all of ``clients``.

    Raises:
        ConfigError: ``work`` has what each device of each round gets of its own, or as of :func:`as_chosen`.
    """
    job, work = as_chosen(job, work)
    given = [name for name in OF_DEVICES if getattr(work, name)]
    given += ["learns"] if work.learns != ADAPTER else []
    if given:
        raise ConfigError(
            f"work: {' and '.join(given)} cannot be given; devices get their own, by the job's seed and round"
        )
    fields: dict[str, Any] = msgspec.structs.asdict(job) | {"min_clients": job.min_clients or job.clients}
    fields |= {"num_layers": num_layers, "num_elements": num_elements, "num_classes": num_classes}
    return Settings(**fields, artifact=artifact, work=work, head=head, still=still, score=score)


def as_chosen(job: Job, work: LocalWork) -> tuple[Job, LocalWork]:
    """Say policy ``auto`` as what it means, a configurator, and hold back what that measures on.

    Raises:
        ConfigError: policy ``auto`` is given settings, which it chooses itself, or another configurator.
    """
    if work.policy.name == AUTO:
        if work.policy != PolicySpec(name=AUTO):
            raise ConfigError("policy 'auto' chooses each device's policy with its settings; give none")
        if job.configurator not in (AUTO, FIXED):
            raise ConfigError(
                f"policy 'auto' is a configurator too, beside {job.configurator!r}; give one of them"
            )
        job = msgspec.structs.replace(job, configurator=AUTO)
        work = msgspec.structs.replace(work, policy=PolicySpec())
    if job.configurator == AUTO and not work.held_out:
        work = msgspec.structs.replace(work, held_out=HELD_OUT)
    return job, work


def differences(mine: Settings, theirs: Settings) -> list[str]:
    """Fields that make of two settings two jobs, as 'clients: 4, was 3', and of their work as 'work.optimizer.lr'."""
    left, right = values_of(mine), values_of(theirs)
    names = [name for name in left if name not in PATIENT and left[name] != right[name]]
    unsaid = [name for name in _SIZES if not (left[name] and right[name])]
    names = [name for name in names if name not in unsaid]
    return [f"{name}: {left[name]!r}, was {right[name]!r}" for name in names]


def device_work(settings: Settings, *, round_number: int, position: int) -> LocalWork:
    """Work of the device asked as number ``position`` (from 0) in a round (from 1), with a seed of its own.

    It says how many rounds came before, also to a device that was not asked in them: in a round all train the same layers.
    A round for the head does not count: after it a job draws as it would have without.
    """
    if round_number <= settings.head_rounds:
        return msgspec.structs.replace(
            settings.work,
            learns=CLASS_MEANS,
            codec=_EXACT,
            codec_ratio=0.0,
            codec_bits=0,
            sums_bits=_sums_bits(settings),
            seed=settings.seed,
        )
    trained = round_number - settings.head_rounds
    seed = device_seed(settings.seed, round_number=trained, position=position)
    shared = settings.seed if settings.work.rows else 0
    codec = _CODECS.get(settings.secure, settings.work.codec)
    work = msgspec.structs.replace(
        settings.work, codec=codec, seed=seed, rounds_before=trained - 1, rows_seed=shared
    )
    return settings.dp.asked(work, settings.min_clients)


def _sums_bits(settings: Settings) -> int:
    """Bits of the significand of a class sum: all where updates go up to the bit, few where they go in few."""
    if not settings.is_lossy_up:
        return 0
    is_half = settings.work.codec == "fp16" or settings.work.codec_bits == _HALF
    return SUMS_BITS_OF_HALF if is_half else SUMS_BITS


def device_seed(seed: int, *, round_number: int, position: int) -> int:
    """Draw a device's seed from the job's; the first device of the first round has the job's own.

    So one local run is one federated round. The others share no draw with those of a job whose seed is near.
    """
    if (round_number, position) == (1, 0):
        return seed
    return int(integers(Key(seed, "devices", round_number, position), 1)[0])
