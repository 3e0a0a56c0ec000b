"""What a job must keep to before it begins: all that the aggregator or a device would refuse later."""

from collections.abc import Collection, Iterator
from math import prod

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.privacy import CENTRAL, DISTRIBUTED, LOCAL, PRIVACIES
from fleetune.broker.jobs.settings import AUTO, FIXED, MASK_SHARE, MASKS, PLAIN, Job, Settings
from fleetune.broker.jobs.work import settings_of
from fleetune.broker.methods.accounting import epsilon_of, rounds_within
from fleetune.broker.methods.configurators import CONFIGURATORS, OF_LAYERS, OF_RANK
from fleetune.broker.methods.private_mean import OF_MEANS
from fleetune.broker.methods.selection import SELECTIONS
from fleetune.broker.methods.strategies import OF_RANKS, STRATEGIES
from fleetune.broker.methods.traffic import TRAFFIC
from fleetune.broker.tasks import Outcome, Packing, Task
from fleetune.device_runtime.contracts.accounting import sampling_problems
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.class_means import ClassHead, class_head
from fleetune.device_runtime.contracts.class_weights import class_weight_problems
from fleetune.device_runtime.contracts.codecs import EXACT, make_codec
from fleetune.device_runtime.contracts.fields import check_name
from fleetune.device_runtime.contracts.lora import frozen_names, lora_problems
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.scores import score_of
from fleetune.device_runtime.contracts.secure_sums.grid import modulus_bits
from fleetune.device_runtime.contracts.secure_sums.keys import need_cryptography
from fleetune.device_runtime.contracts.thresholds import stays
from fleetune.device_runtime.contracts.work import CONSENSUS, FULL, WHOLE, LocalWork, PolicySpec
from fleetune.device_runtime.errors import ConfigError, choices
from fleetune.device_runtime.methods import work as works
from fleetune.device_runtime.methods.policies import still_layers
from fleetune.device_runtime.options import problems, refuse

TABLES: dict[str, Collection[str]] = {
    **works.TABLES,
    **{table.kind: table for table in (STRATEGIES, SELECTIONS, CONFIGURATORS, TRAFFIC)},
    "dp": PRIVACIES,
}
"""Where the names in a job and its work are looked up."""


def lawful_settings(artifact: Artifact, job: Job, *, work: LocalWork, patience: Patience) -> Settings:
    """Settings of a job of this artifact; raises as :func:`check_settings`, and for what this artifact has not."""
    manifest = artifact.manifest
    head = class_head(manifest) if job.head_start == "class-mean" else ClassHead()
    settings = settings_of(
        job,
        artifact=artifact.digest,
        work=work,
        num_layers=manifest.num_layers,
        num_elements=sum(prod(tensor.shape) for tensor in manifest.tensors if tensor.trainable),
        num_classes=len(manifest.labels),
        score=score_of(manifest),
        head=head,
        still=_still(manifest, work) if job.dp.is_on else (),
    )
    check_settings(settings, patience, num_layers=manifest.num_layers, learning=len(manifest.learning))
    refuse(lora_problems(settings.work, manifest))
    refuse(class_weight_problems(settings.work.class_weights, manifest))
    if settings.secure == MASKS:
        need_cryptography()
    return settings


def _still(manifest: Manifest, work: LocalWork) -> tuple[str, ...]:
    """Tensors that a job's work never trains, by name; of a policy that is none all may learn, and the job is refused."""
    frozen = frozen_names([row.name for row in manifest.trainable], work)
    try:
        layers = still_layers(work.policy, manifest.num_layers)
    except ConfigError:
        return ()
    return tuple(row.name for row in manifest.trainable if row.layer in layers or row.name in frozen)


def check_settings(
    settings: Settings, patience: Patience, *, num_layers: int, learning: int | None = None
) -> None:
    """Raise ConfigError that lists everything wrong; UnknownName for one unknown name.

    Args:
        settings: the job's.
        patience: the aggregator's.
        num_layers: of the model; devices would refuse work that does not suit it.
        learning: how many of them have an adapter; None for all.
    """
    check_name("job", settings.job)
    refuse([*_problems(settings, num_layers, learning), *problems(patience)])


def _problems(settings: Settings, num_layers: int, learning: int | None) -> Iterator[str]:
    found = problems(settings, TABLES)
    yield from found
    if not 1 <= settings.min_clients <= settings.clients:
        yield f"min_clients {settings.min_clients}: from 1 to clients ({settings.clients})"
    if settings.head_rounds and not settings.head.weight:
        yield f"head_start {settings.head_start!r}: the head's tensors are not named"
    for name in ("weight_cap", "length_cap"):
        if 0 < (cap := getattr(settings, name)) < 1:
            yield f"{name} {cap:g}: 1 or more, or 0 for no bound; below 1 the middle update itself would be beyond it"
    if settings.explore != "epsilon" and settings.configurator != AUTO:
        yield f"explore {settings.explore!r}: configurator {settings.configurator!r} explores nothing"
    work = settings.work
    if not found:
        work, packing = _example(settings)
        yield from _down_problems(settings, packing)
        yield from _lazy_problems(settings, work)
        yield from _lora_problems(settings)
        yield from _configurator_problems(settings)
        yield from _traffic_problems(settings)
        yield from _privacy_problems(settings, packing)
        yield from _secure_problems(settings)
    of_work = works.work_problems(work, num_layers, learning=learning)
    yield from (said for said in of_work if said not in found)


def _down_problems(settings: Settings, packing: Packing) -> Iterator[str]:
    if packing.codec in (FULL, WHOLE):
        if settings.down_ratio:
            yield f"down_ratio {settings.down_ratio:g}: {packing.codec!r} has none"
        if settings.down_bits:
            yield f"down_bits {settings.down_bits}: {packing.codec!r} has none"
        return
    try:
        if make_codec(packing.codec, packing.ratio, packing.bits).receiver:
            yield f"down_codec {packing.codec!r}: it remembers each device's updates, and is for codec alone"
    except ConfigError as exc:
        yield str(exc)


def _lazy_problems(settings: Settings, work: LocalWork) -> Iterator[str]:
    try:
        is_remembered = bool(make_codec(work.codec, work.codec_ratio, work.codec_bits).receiver)
    except ConfigError:
        return
    if settings.lazy and not is_remembered:
        yield f"lazy {settings.lazy:g}: codec {work.codec!r} remembers no update; 'innovation' does"


def _example(settings: Settings) -> tuple[LocalWork, Packing]:
    """The work of a device in its second round, and how it is sent a version, as the traffic planner would have them."""
    traffic, usual = (
        TRAFFIC[settings.traffic](),
        Packing(settings.down_codec, settings.down_ratio, settings.down_bits),
    )
    state = traffic.learn(traffic.init(settings), Outcome("d", settings.work, {}, round=1, num_samples=1))
    (carriage,) = traffic.choose(state, [Task("t", "d", "train", 2, 1, 0, settings.work)], 0.0)
    return carriage.work, carriage.down or usual


def _lora_problems(settings: Settings) -> Iterator[str]:
    strategy, work = settings.strategy, settings.work
    for name, count in (("rank", work.rank), ("rows", work.rows)):
        if count and strategy not in OF_RANKS:
            yield f"{name} {count}: strategy {strategy!r} averages whole tensors; of parts: {choices(OF_RANKS)}"
    if work.mask != CONSENSUS and (settings.mask_share != MASK_SHARE or settings.mask_every):
        yield f"mask_share and mask_every are of mask {CONSENSUS!r}"
    if settings.mask_every == 1:
        yield "mask_every 1: every round would vote, and no mask be used; 0, or 2 or more"
    if parts := [name for name in ("rank", "rows") if getattr(work, name) and work.mask]:
        yield f"mask {work.mask!r}: it is of whole tensors; leave {' and '.join(parts)} out"
    yield from _local_problems(settings)
    if work.rank and work.rows > work.rank:
        yield f"rows {work.rows}: of the {work.rank} components of the rank"
    if work.frozen and strategy == "product":
        yield f"frozen {work.frozen!r}: strategy 'product' makes A anew; the mean of B alone is exact: 'fedavg'"


def _local_problems(settings: Settings) -> Iterator[str]:
    work = settings.work
    if not stays(work):
        return
    if settings.strategy != "fedavg":
        yield f"mask {work.mask!r}: strategy {settings.strategy!r} has no updates of parameters; 'fedavg'"
    if parts := [name for name in ("frozen", "personal") if getattr(work, name)]:
        yield f"mask {work.mask!r}: all parameters learn and stay on the device; leave {' and '.join(parts)} out"


def _configurator_problems(settings: Settings) -> Iterator[str]:
    name, work = settings.configurator, settings.work
    if name in OF_LAYERS and work.policy != PolicySpec():
        yield f"policy {work.policy.name!r}: configurator {name!r} chooses the layers itself; leave it out"
    if name in OF_RANK and not work.rank:
        yield f"configurator {name!r}: give the largest rank that it may choose (rank)"


def _traffic_problems(settings: Settings) -> Iterator[str]:
    name, usual = settings.traffic, Settings(job="", rounds=1, clients=1, artifact="")
    traffic = TRAFFIC[name]()
    for field in traffic.chooses:
        of = settings if hasattr(settings, field) else settings.work
        default = usual if of is settings else usual.work
        if (given := getattr(of, field)) != getattr(default, field):
            yield f"{field} {given!r}: traffic planner {name!r} chooses it itself; leave it out"
    if settings.compress_up_min > settings.compress_up:
        yield f"compress_up_min {settings.compress_up_min:g}: at most compress_up ({settings.compress_up:g})"
    if settings.work.histogram and not traffic.hears_labels:
        yield f"histogram: traffic planner {name!r} has no use for it"


def _privacy_problems(settings: Settings, packing: Packing) -> Iterator[str]:
    """What differential privacy cannot be had with; all that is allowed is accounted for, or comes after the noise."""
    privacy = settings.dp
    if not privacy.is_on:
        yield from (
            f"{name} {value:g}: dp is 'none'; it is of {choices(PRIVACIES[1:])}"
            for name in ("clip", "noise", "sample_rate", "most_epsilon")
            if (value := getattr(privacy, name))
        )
        return
    needed = ("clip", "noise", "sample_rate") if privacy.of_samples else ("clip", "noise")
    if missing := [name for name in needed if not getattr(privacy, name)]:
        yield f"dp {privacy.name!r}: {' and '.join(missing)} must be above 0"
        return
    if privacy.of_samples:
        yield from sampling_problems(privacy.asked(settings.work, 1))
        if settings.work.class_weights:
            yield f"dp {privacy.name!r}: class_weights make a sample's share depend on the others'; leave them out"
    elif privacy.sample_rate:
        yield f"sample_rate {privacy.sample_rate:g}: it is of dp 'sample'"
    yield from (f"dp {privacy.name!r}: {said}" for said in _uncovered(settings))
    if privacy.device_noise(settings.min_clients):
        yield from (f"dp {privacy.name!r}: {said}" for said in _uncovered_here(settings, packing))
    if not settings.work.steps and not settings.work.epochs:
        return
    cost = epsilon_of(privacy, 1, settings.work)
    if rounds_within(privacy, settings.work) == 0:
        yield f"most_epsilon {privacy.most_epsilon:g}: one round of a device has {cost:.4g}; give more noise"


def _uncovered(settings: Settings) -> Iterator[str]:
    """What would tell of a device beside the sum, or the steps, that have noise."""
    if settings.dp.of_devices and settings.strategy not in OF_MEANS:
        yield f"strategy {settings.strategy!r} uses more of the updates than their mean; {choices(OF_MEANS)} do not"
    for kind in ("configurator", "traffic"):
        if (name := getattr(settings, kind)) != FIXED:
            yield f"{kind} {name!r} goes by what devices tell, which has no noise; {FIXED!r}"
    if settings.head_rounds:
        yield f"head_start {settings.head_start!r}: class sums have no noise; 'none'"
    if settings.work.mask:
        yield f"mask {settings.work.mask!r}: it is made from updates without noise; leave it out"


def _uncovered_here(settings: Settings, packing: Packing) -> Iterator[str]:
    """What would tell of a device beside its update that has noise."""
    work = settings.work
    if work.personal:
        yield "personal: which layers a device keeps tells of its data; leave it out"
    if make_codec(work.codec, work.codec_ratio, work.codec_bits).receiver:
        yield f"codec {work.codec!r} may ask for one update twice, with other noise; another codec"
    if packing.codec not in (FULL, WHOLE, *EXACT):
        yield f"down_codec {packing.codec!r} may ask for one update twice, with other noise; {choices((FULL, WHOLE, *EXACT))}"


_OF_SUMS = ("fedavg", "fedavgm")
"""Strategies that need nothing of a round but its weighted sum."""
_NOT_SUMMED = {
    CENTRAL: "bounds each update, and here the aggregator looks at none",
    DISTRIBUTED: "counts on the noise of a sum of exact updates; these are rounded one by one",
    LOCAL: "divides by clients, a sum on the grid by the weight of those that came",
}
"""What kinds of differential privacy need that a sum on the grid does not give."""
_FEWEST = 3
"""Devices of a masked sum: of two, each could take its own update from it."""


def _secure_problems(settings: Settings) -> Iterator[str]:
    """What a job whose updates are only summed has against settings that need single ones, or other numbers."""
    if settings.secure == PLAIN:
        usual = Job(job="", rounds=1, clients=1)
        given = [
            n for n in usual.__struct_fields__ if n.startswith("secure_") and _differs(n, settings, usual)
        ]
        yield from (f"{name}: of a job with secure 'masks' or 'grid'" for name in given)
        return
    named, work = f"secure {settings.secure!r}", settings.work
    if settings.strategy not in _OF_SUMS:
        yield f"{named}: strategy {settings.strategy!r} needs single updates; {choices(_OF_SUMS)}"
    for name in ("configurator", "traffic"):
        if getattr(settings, name) != FIXED:
            yield f"{named}: {name} {getattr(settings, name)!r} goes by single devices; leave it out"
    if settings.dp.of_devices:
        yield f"{named}: dp {settings.dp.name!r} {_NOT_SUMMED[settings.dp.name]}; leave it out"
    if settings.head_start != "none":
        yield f"{named}: head_start {settings.head_start!r} sends each device's class sums; leave it out"
    if work.codec != "fp32" or work.codec_ratio or work.codec_bits:
        yield f"{named}: codec {work.codec!r}; its updates are packed in secure_bits alone"
    parts = ("mask", "personal", "rank", "rows", "histogram", "held_out")
    if found := [name for name in parts if getattr(work, name)]:
        yield f"{named}: leave {' and '.join(found)} out"
    if settings.secure == MASKS and settings.min_clients < _FEWEST:
        yield f"{named}: min_clients {settings.min_clients}; a sum hides an update among {_FEWEST} or more"
    if settings.secure_neighbours in (1, 2):
        yield f"{named}: secure_neighbours {settings.secure_neighbours}; 0, or 3 and more"
    yield from _grid_problems(settings)


def _grid_problems(settings: Settings) -> Iterator[str]:
    try:
        modulus_bits(settings.grid)
    except ConfigError as exc:
        yield str(exc)


def _differs(name: str, settings: Settings, usual: Job) -> bool:
    return bool(getattr(settings, name) != getattr(usual, name))
