"""Messages between device and aggregator: msgpack maps, tagged by ``type``, unknown fields skipped, sizes capped first.

Topics (``fleetune/v1/{job}/…``):

- ``device/{device_id}/up``      device -> aggregator: Hello, UpdateReady, Report, Decline, Request, Chunk, MaskKeys, MaskShares,
  MaskReveal
- ``device/{device_id}/down``    aggregator -> device: Offer, Verdict, Request, Chunk, Finished, MaskGroup, MaskInbox, MaskAsk
- ``device/{device_id}/status``  retained, with a last will: DeviceStatus
- ``aggregator/status``          retained: AggregatorStatus, a small pointer, never weights

Every message may come twice, late, out of order or never. A transfer is announced by its :class:`TransferManifest`
(inside Offer or UpdateReady); whoever receives it pulls chunks by bitmap with :class:`Request`.
"""

import re
from typing import Annotated, NamedTuple, TypeVar, Union, get_args

import msgspec
from msgspec import Meta

from fleetune.device_runtime.draws import SEED_MAX
from fleetune.device_runtime.errors import ConfigError, WireError, one_line
from fleetune.device_runtime.options import Option

VERSION = 1
CHUNK_BYTES = 120 * 1024
"""Largest chunk payload; AWS IoT Core takes 128 KB a message and 128 KB is also the fastest size measured."""
MESSAGE_BYTES_MAX = 128 * 1024
"""A message larger than this is refused before it is decoded."""
TRANSFER_BYTES_MAX = 4 * 1024**3
REASON_CHARS_MAX = 500
"""So much of a reason is sent, and taken."""
COUNT_MAX = 2**31 - 1
"""Largest round, version, number of samples or steps: a sum of many still fits an int64 and is exact as float64."""
SECONDS_MAX = 1e9
FIGURE_MAX = 1e39
"""A loss or another statistic is at most this, which no float32 exceeds; a store keeps none beyond it."""
STATS_MAX = 32
"""Statistics of one update."""
CLASSES_MAX = 4096
"""Classes of one label histogram."""
CAUSES = ("memory", "work", "")
"""Why a device declines."""
ROLES = ("train", "evaluate")
"""What a device may be in a job for."""
ADAPTER, CLASS_MEANS = LEARNED = ("adapter", "class-means")
"""What may come of a device's work."""
HEAD_STARTS = ("none", "class-mean")
"""What a model's head may begin with: as it was exported, or the class means of all training data."""
FULL = "full"
"""The down codec of an adapter that is sent as it is, as the bytes of its safetensors file. In a job: to the bit, in whatever
way is shorter."""
WHOLE = "whole"
"""In a job alone: always as it is, whatever a device holds."""
CONSENSUS, THRESHOLDS, NOTHING = MASKS = ("consensus", "thresholds", "nothing")
"""What :attr:`LocalWork.mask` may name."""
MASKED, GRID = SUMMED = ("masked", "grid")
"""Codecs of work whose updates are whole numbers that are only ever summed, under masks or (to compare) without."""
NEIGHBOURS_MAX = 512
"""Devices that one device masks with: their keys and shares fit a message."""
LORA_A = "lora-a"
"""What :attr:`LocalWork.frozen` may name."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_ASCII = r"^[ -~]*\Z"


class Shown(NamedTuple):
    """Marks text for people: cut to ``chars_max`` and made printable when it is decoded, not refused."""

    chars_max: int


Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Held = Annotated[int, Meta(ge=-1, le=COUNT_MAX)]
"""A version, -1 for none."""
Word = Annotated[str, Meta(max_length=64, pattern=_ASCII)]
"""A name or a digest: printable ASCII."""
TaskId = Annotated[str, Meta(max_length=128, pattern=_ASCII)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=SECONDS_MAX)]
Text = Annotated[str, Shown(REASON_CHARS_MAX)]
Stats = Annotated[dict[Word, float], Meta(max_length=STATS_MAX)]
Key32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Places = Annotated[list[Count], Meta(max_length=NEIGHBOURS_MAX + 1)]
"""Places in a group of devices that are summed together."""


class TransferManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a transfer holds. ``chunk_digests`` is 8 bytes of SHA-256 per chunk, concatenated; ``sha256`` is of the whole."""

    size_bytes: Annotated[int, Meta(ge=0, le=TRANSFER_BYTES_MAX)]
    chunk_bytes: Count
    chunk_digests: Annotated[bytes, Meta(max_length=64 * 1024)]
    sha256: Word


class PolicySpec(msgspec.Struct, frozen=True, kw_only=True):
    """A layer policy by name. ``drop`` is the mean share of layers dropped, or not trained if the policy drops none.

    Steps are counted through all rounds. What a policy has no use for stands at its default.
    """

    name: Annotated[Word, Option("which layers train in a step", table="policy")] = "full"
    drop: Annotated[
        float,
        Option(
            "mean share of layers dropped (coto: without adapter; those that drop none: not trained), 0 to below 1",
            at_least=0,
            below=1,
        ),
    ] = 0.0
    shape: Annotated[Word, Option("which layers are dropped more", table="depth shape")] = "uniform"
    period: Annotated[
        int,
        Option(
            "successive, cyclic: steps on one group of layers; growing: until the suffix grows; 0 for all others",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    schedule: Annotated[Word, Option("how the share dropped goes over the steps", table="schedule")] = (
        "constant"
    )
    horizon: Annotated[
        int,
        Option(
            "step at which dropping has fallen to nothing, or ends; 0 for schedule constant",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    protected: Annotated[int, Option("so many layers are never dropped", at_least=0, at_most=COUNT_MAX)] = 0
    protect: Annotated[
        Word, Option("which: the outermost, or those whose absence tells most", choices=("ends", "effect"))
    ] = "ends"
    gates: Annotated[
        Word,
        Option("what a dropped layer is dropped for: a batch, or some of its rows", choices=("batch", "row")),
    ] = "batch"
    width: Annotated[
        int,
        Option(
            "growing: layers trained at first, and more in each period; block: layers trained; dropbp, coto: topmost "
            "layers that take part, 0 for all",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    first: Annotated[int, Option("block: lowest layer trained", at_least=0, at_most=COUNT_MAX)] = 0


class OptimizerSpec(msgspec.Struct, frozen=True, kw_only=True):
    """How a device descends; in a federation afresh in every round."""

    name: Annotated[Word, Option("optimizer", table="optimizer")] = "adamw"
    lr: Annotated[float, Option("learning rate at its peak", above=0)] = 2e-3
    weight_decay: Annotated[
        float, Option("weight decay, as torch's optimizer of that name takes it", at_least=0)
    ] = 0.0
    warmup_steps: Annotated[int, Option("steps of linear warm-up", at_least=0, at_most=COUNT_MAX)] = 0
    decay: Annotated[Word, Option("the rate after the warm-up", table="decay")] = "constant"
    clip_norm: Annotated[
        float, Option("clip the global gradient norm to this; 0 for no clipping", at_least=0)
    ] = 0.0
    proximal: Annotated[
        float,
        Option("pull to the adapter that the run started from, FedProx's mu; 0 for none", at_least=0),
    ] = 0.0


class LocalWork(msgspec.Struct, frozen=True, kw_only=True):
    """What a device does in one round. ``steps`` = 0 means ``epochs`` passes over its data."""

    policy: PolicySpec = PolicySpec()
    optimizer: OptimizerSpec = OptimizerSpec()
    steps: Annotated[
        int,
        Option("steps, in a federation of each round; 0 to count epochs", at_least=0, at_most=COUNT_MAX),
    ] = 0
    epochs: Annotated[
        int,
        Option(
            "passes over the data, in a federation in each round, if steps is 0",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 1
    batch_size: Annotated[int, Option("samples a step", at_least=1, at_most=COUNT_MAX)] = 16
    seq_len: Annotated[int, Option("longest sequence, in tokens", at_least=1, at_most=COUNT_MAX)] = 128
    seed: Annotated[int, Option("seed of everything random", at_least=0, below=SEED_MAX + 1)] = 0
    codec: Annotated[Word, Option("how updates are packed", table="codec")] = "fp32"
    codec_ratio: Annotated[
        float, Option("topk, caesar: share of the elements that is sent up; 0 for all others", at_least=0)
    ] = 0.0
    codec_bits: Annotated[
        int,
        Option(
            "bits of a value that is sent up, where the codec has a choice; 0 for the codec's own",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    rounds_before: Annotated[
        int,
        Option(
            "rounds of the job before this one, as long as this one: a policy counts its steps on",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    learns: Annotated[
        Word,
        Option(
            "what comes of the work: a trained adapter, or sums for a class-mean head from one forward pass",
            choices=LEARNED,
        ),
    ] = ADAPTER
    held_out: Annotated[
        float,
        Option(
            "share of a device's own samples kept back from training, to measure what a round has gained; 0 for none",
            at_least=0,
            at_most=0.5,
        ),
    ] = 0.0
    cache_below: Annotated[
        int,
        Option(
            "no layer below this one learns on any device: what flows into it may be kept from round to round; "
            "-1: below the lowest that learns here",
            at_least=-1,
            at_most=COUNT_MAX,
        ),
    ] = -1
    frozen: Annotated[
        Word,
        Option(
            "part of the adapter that is not trained, the A of every LoRA pair; none without it",
            choices=("", LORA_A),
        ),
    ] = ""
    rank: Annotated[
        int,
        Option(
            "train the first so many components of every LoRA pair; 0 for all", at_least=0, at_most=COUNT_MAX
        ),
    ] = 0
    rows: Annotated[
        int,
        Option(
            "so many components of every LoRA pair learn and travel in a round, drawn anew for each; 0 for all",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    rows_seed: Annotated[
        int,
        Option(
            "seed that they are drawn by: all devices of a round have the same",
            at_least=0,
            below=SEED_MAX + 1,
        ),
    ] = 0
    mask: Annotated[
        Word,
        Option(
            "what travels of an update: all, the elements of a mask that the devices agree on by vote, thresholds of rank "
            "components alone, or nothing; with the last two every parameter stays on its device",
            choices=("", *MASKS),
        ),
    ] = ""
    personal: Annotated[
        int,
        Option(
            "layers whose adapters each device keeps to itself, chosen anew in each round; 0 for none",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    personal_by: Annotated[Word, Option("which layers stay personal", table="ranking of layers")] = (
        "importance"
    )
    sums_bits: Annotated[
        int,
        Option(
            "bits of the significand of a class sum that is sent up; 0 for all of float32's",
            at_least=0,
            at_most=23,
        ),
    ] = 0
    histogram: Annotated[
        bool,
        Option(
            "ask each device once how many of its samples are of which class; only one with --tell-labels says so",
        ),
    ] = False
    micro_tokens: Annotated[
        int,
        Option(
            "rows times tokens of a batch that run at a time, padding included, at least one row: less memory, the same "
            "gradients; 0 for no bound",
            at_least=0,
            at_most=COUNT_MAX,
        ),
    ] = 0
    most_norm: Annotated[
        float,
        Option("L2 norm of an update's whole change, which is scaled down to it; 0 for any", at_least=0),
    ] = 0.0
    noise: Annotated[
        float,
        Option(
            "normal noise that the device adds to each element of its change, by its standard deviation in most_norm; then "
            "no figures come with the update; 0 for none",
            at_least=0,
        ),
    ] = 0.0


class SumGrid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The public grid of updates that are summed as whole numbers; blank of all others."""

    bits: Annotated[int, Meta(ge=0, le=24)] = 0
    """Of an element's change, its sign included; 0: there is no grid."""
    weight_bits: Annotated[int, Meta(ge=0, le=20)] = 0
    """Of a device's weight, its samples; more samples count as 2**weight_bits - 1. 0: every device counts the same."""
    summands: Annotated[int, Meta(ge=0, le=100_000)] = 0
    """Devices that are summed at most."""
    limit: Annotated[float, Meta(ge=0, le=1e6)] = 0.0
    """Largest magnitude of an element's change; a larger one is cut."""


class Hello(msgspec.Struct, frozen=True, kw_only=True, tag="hello"):
    """A device is here. Sent at start, after every reconnection, and when it has waited long."""

    v: int = VERSION
    device_id: Word
    artifact: Word
    """SHA-256 of the device's manifest.json."""
    role: Word = "train"
    """One of :data:`ROLES`."""
    num_samples: Count = 0
    version: Held = -1
    """Adapter version the device holds, -1 for none."""
    holds: Word = ""
    """SHA-256 of the adapter file that differences may be taken from; empty: every adapter is to be sent whole."""
    mask: Word = ""
    """SHA-256 of the mask that the device holds; empty for none."""
    original: Word = ""
    """SHA-256 of the adapter file that the artifact brought: differences may be taken from it too. Empty: it is ``holds``, or
    they may not."""


class Offer(msgspec.Struct, frozen=True, kw_only=True, tag="offer"):
    """Work for one device in one round, from adapter ``version``."""

    v: int = VERSION
    job: Word
    task_id: TaskId = ""
    """Which task this is, unique in the job; empty: :func:`default_task_id`, as for all messages that carry one."""
    round: Count
    version: Count
    role: Word
    work: LocalWork
    adapter: TransferManifest
    """What travels: the adapter file, or its difference from ``reference``."""
    adapter_sha256: Word = ""
    """Of the adapter file that the device starts from, once ``adapter`` is decoded; empty: as ``adapter`` has it."""
    down_codec: Word = FULL
    """How ``adapter`` is packed."""
    down_ratio: Share = 0.0
    """Share of the elements that ``topk`` sends, and ``caesar`` exactly; 0 for all other codecs."""
    down_bits: Count = 0
    """Bits of a value, where the codec has a choice; 0 for the codec's own."""
    reference: Word = ""
    """SHA-256 of the adapter file that ``adapter`` is a difference from; empty: from none."""
    memory: Word = ""
    """Chain of what the aggregator remembers of the device's updates, for codecs with a receiver's memory; a device that
    remembers another sends without. Empty: nothing."""
    lazy: Annotated[float, Meta(ge=0, le=FIGURE_MAX)] = 0.0
    """Codec ``innovation``: squared norm below which an innovation may stay here and the last update be repeated; 0: none."""
    is_exact: bool = True
    """Whether the device starts from ``version`` to the bit. If not, its update names what it started from."""
    mask_sha256: Word = ""
    """Of the mask whose elements alone the update holds; empty: it holds all."""
    mask_bytes: Count = 0
    """So many bytes at the end of what travels are that mask; 0 where the device holds it."""
    grid: SumGrid = SumGrid()
    """Of codecs ``masked`` and ``grid``."""
    deadline_s: Seconds
    """Seconds left until the round closes, counted from when the offer was sent; 0 for no deadline."""


class UpdateReady(msgspec.Struct, frozen=True, kw_only=True, tag="update"):
    """A device has an update to be pulled; repeated until a Verdict on (job, task_id, digest) comes."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId = ""
    round: Count
    version: Count
    """Adapter version the update starts from."""
    codec: Word
    num_samples: Count
    payload: TransferManifest
    stats: Stats = {}
    """``loss`` and ``loss_first``: means of the last and the first steps; ``active_layers`` and ``trained_layers``: means of the
    steps; ``seconds``: of all steps; ``peak_mb``: expected peak of a step, 10^6 bytes. With a held-out part, on its
    ``held_samples`` rows at full depth: ``held_loss_before`` and ``held_accuracy_before`` the first step, ``held_loss_after`` and
    ``held_accuracy_after`` the last; ``held_seconds`` for measuring. If layers stay personal too, ``personal_loss`` and
    ``personal_accuracy`` of the device's own model, ``global_loss`` and ``global_accuracy`` of the version that it was sent.
    ``fetch_seconds``: from the offer to the last chunk of its adapter, if that was not at hand. Of a device with terms,
    ``change_norm``, the L2 norm of its change, and ``clip_scale``, what that was multiplied by.
    What is not finite, or beyond 1e39, is not kept."""
    histogram: Annotated[list[int], Meta(max_length=CLASSES_MAX)] = []
    """Samples of each class, in the artifact's order; only where the work asks for it and the device's owner allows it."""


class Report(msgspec.Struct, frozen=True, kw_only=True, tag="report"):
    """An evaluating device's measurement of an adapter version; repeated until a Verdict comes."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId = ""
    round: Count
    version: Count
    loss: float
    """Finite and at most 1e39, or a verdict refuses it: of a model that went astray it is neither."""
    accuracy: float
    """0 to 1, or a verdict refuses it."""
    num_samples: Count


class Decline(msgspec.Struct, frozen=True, kw_only=True, tag="decline"):
    """A device cannot do a task; sent once, so that nobody waits for it."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId = ""
    round: Count
    reason: Text
    cause: Word = ""
    """One of :data:`CAUSES`: ``memory``: too little of it; ``work``: it cannot be done as asked; empty: any other."""


class Verdict(msgspec.Struct, frozen=True, kw_only=True, tag="verdict"):
    """The aggregator's durable answer to an update (``digest`` = its sha256) or a report (``digest`` empty)."""

    v: int = VERSION
    job: Word
    task_id: TaskId = ""
    round: Count
    digest: Word = ""
    accepted: bool
    reason: Text = ""


class Request(msgspec.Struct, frozen=True, kw_only=True, tag="request"):
    """Send me the chunks of transfer ``sha256`` whose bits are set in ``missing`` (bit i of byte i // 8), lowest first."""

    v: int = VERSION
    sha256: Word
    missing: Annotated[bytes, Meta(max_length=1024)]
    limit: Count = 16
    """At most this many chunks now."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk"):
    """One chunk of transfer ``sha256``."""

    v: int = VERSION
    sha256: Word
    index: Count
    data: Annotated[bytes, Meta(max_length=CHUNK_BYTES)]


class MaskPeer(msgspec.Struct, frozen=True, kw_only=True):
    """A device of a group, as the others are told of it."""

    place: Count
    device_id: Word
    mask_key: Key32
    """X25519 public key of its pair masks."""
    share_key: Key32
    """X25519 public key that shares are sealed for."""


class MaskShare(msgspec.Struct, frozen=True, kw_only=True):
    """Something of, or for, the device at a place of a group."""

    place: Count
    data: Annotated[bytes, Meta(max_length=128)]


Peers = Annotated[list[MaskPeer], Meta(max_length=NEIGHBOURS_MAX)]
Shares = Annotated[list[MaskShare], Meta(max_length=NEIGHBOURS_MAX + 1)]


class MaskKeys(msgspec.Struct, frozen=True, kw_only=True, tag="mask_keys"):
    """A device's keys for one task of codec ``masked``; repeated until a MaskGroup comes."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId
    round: Count
    mask_key: Key32
    """As of MaskPeer."""
    share_key: Key32
    """As of MaskPeer."""
    seed_digest: Key32
    """SHA-256 of the seed of its own mask."""


class MaskGroup(msgspec.Struct, frozen=True, kw_only=True, tag="mask_group"):
    """Whom a device masks with, and is to share its secrets with."""

    v: int = VERSION
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    """Name of the devices that are summed together, another for each attempt."""
    place: Count
    """The device's own."""
    mask_key: Key32
    """The device's own, as it was heard: one that has made others since takes no part."""
    threshold: Count
    """Shares that give a secret."""
    peers: Peers


class MaskShares(msgspec.Struct, frozen=True, kw_only=True, tag="mask_shares"):
    """A device's two secrets in shares, sealed for each of its neighbours; repeated until a MaskInbox comes."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    shares: Shares
    """By the place of whom they are for."""


class MaskInbox(msgspec.Struct, frozen=True, kw_only=True, tag="mask_inbox"):
    """What a device's neighbours sealed for it: it masks with these, and no others."""

    v: int = VERSION
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    shares: Shares
    """By the place of whom they are from."""


class MaskAsk(msgspec.Struct, frozen=True, kw_only=True, tag="mask_ask"):
    """Whose updates are in the sum: of these a device tells the shares of their own seeds, of the others those of their keys."""

    v: int = VERSION
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    delivered: Places
    dropped: Places


class MaskReveal(msgspec.Struct, frozen=True, kw_only=True, tag="mask_reveal"):
    """A device's answer to a MaskAsk; the same again if it is asked again, and none to another."""

    v: int = VERSION
    device_id: Word
    job: Word
    task_id: TaskId
    round: Count
    group: Word
    seeds: Shares
    """Shares of the seeds of those that delivered, by their places."""
    secrets: Shares
    """Shares of the private mask keys of those that dropped out."""


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The job is over, or the device is not wanted: it may stop."""

    v: int = VERSION
    job: Word
    reason: Text = ""
    is_error: bool = False
    """The device cannot take part as it is."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True, tag="device_status"):
    """Retained under the device's status topic; the last will says offline."""

    v: int = VERSION
    device_id: Word
    online: bool
    paused: Text = ""
    """Why its own rules forbid it to work now; empty if they do not. It hears and answers all the same."""
    session: Word = ""
    """Another with every start: a device that finds a status of another session under its own topic has a namesake."""


class AggregatorStatus(msgspec.Struct, frozen=True, kw_only=True, tag="aggregator_status"):
    """Retained. ``session`` changes with every start of the aggregator: a device that sees a new one says Hello again.

    Not retained, and with an empty session, it is a knock: an aggregator that wants the job asks whether another is at
    work on it, which answers with its own status.
    """

    v: int = VERSION
    job: Word
    session: Word
    online: bool
    round: Count
    version: Count
    finished: bool = False


Message = Union[  # noqa: UP007 (msgspec takes a tagged union)
    Hello,
    Offer,
    UpdateReady,
    Report,
    Decline,
    Verdict,
    Request,
    Chunk,
    Finished,
    DeviceStatus,
    AggregatorStatus,
    MaskKeys,
    MaskGroup,
    MaskShares,
    MaskInbox,
    MaskAsk,
    MaskReveal,
]
MaskMessage = MaskKeys | MaskShares | MaskReveal
"""What devices say of masks."""
M = TypeVar("M", bound=Message)

_TEXTS: dict[type, dict[str, int]] = {
    kind: {
        field.name: note.chars_max
        for field in msgspec.structs.fields(kind)
        for note in get_args(field.type)[1:]
        if isinstance(note, Shown)
    }
    for kind in get_args(Message)
}
_encoder = msgspec.msgpack.Encoder()
_decoder: "msgspec.msgpack.Decoder[Message]" = msgspec.msgpack.Decoder(Message)


def encode(message: Message) -> bytes:
    """Message to bytes."""
    return _encoder.encode(message)


def decode(payload: bytes | bytearray | memoryview) -> Message:
    """Bytes to a message; its text for people is printable, on one line and not endless.

    Raises:
        WireError: too large, malformed, out of a field's bounds, of an unknown type, or of another protocol version.
    """
    if len(payload) > MESSAGE_BYTES_MAX:
        raise WireError(f"message of {len(payload)} bytes; at most {MESSAGE_BYTES_MAX} are taken")
    try:
        message = _decoder.decode(payload)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as exc:
        raise WireError(f"malformed message: {one_line(exc)}") from exc
    if message.v != VERSION:
        raise WireError(f"protocol version {message.v}; this side speaks {VERSION}")
    return _printable(message)


def _printable(message: M) -> M:
    shown = {
        name: one_line(getattr(message, name), length_max=chars_max)
        for name, chars_max in _TEXTS[type(message)].items()
    }
    return msgspec.structs.replace(message, **shown) if shown else message


def default_task_id(role: str, number: int, device_id: str) -> str:
    """Identity of a task that was not given one, as in 0.1.0: (role, round to train in or version to evaluate, device)."""
    return f"{role}-{number}-{device_id}"


def task_id_of(message: UpdateReady | Report) -> str:
    """Identity of the task that a device's message answers."""
    if message.task_id:
        return message.task_id
    if isinstance(message, UpdateReady):
        return default_task_id("train", message.round, message.device_id)
    return default_task_id("evaluate", message.version, message.device_id)


def check_name(kind: str, name: str) -> str:
    """Return ``name`` if it may stand in a topic (letters, digits, ``._-``, at most 64), else raise ConfigError."""
    if not is_name(name):
        raise ConfigError(
            f"{kind} {name!r}: use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return name


def is_name(text: str) -> bool:
    """Whether ``text`` may stand in a topic, as :func:`check_name` has it."""
    return _NAME.fullmatch(text) is not None


def device_topic(job: str, device_id: str, leaf: str) -> str:
    """Topic of one device; ``leaf`` is up, down or status, ``device_id`` may be the wildcard ``+``."""
    return f"fleetune/v1/{job}/device/{device_id}/{leaf}"


def aggregator_topic(job: str) -> str:
    """Topic of the aggregator's retained status."""
    return f"fleetune/v1/{job}/aggregator/status"
