"""Messages between device and aggregator: msgpack maps, tagged by ``type``, unknown fields skipped, sizes capped first.

Topics (``fleetune/v1/{job}/…``):

- ``device/{device_id}/up``      device -> aggregator: Hello, UpdateReady, Report, Decline, Request, Chunk, MaskKeys, MaskShares,
  MaskReveal
- ``device/{device_id}/down``    aggregator -> device: Offer, Verdict, Request, Chunk, Finished, MaskGroup, MaskInbox, MaskAsk
- ``device/{device_id}/status``  retained, with a last will: DeviceStatus
- ``shared/{stream}/{part}``     aggregator -> all devices that listen: Chunk, never retained
- ``aggregator/status``          retained: AggregatorStatus, a small pointer, never weights
- ``aggregator/look``            whoever watches -> aggregator: Look
- ``aggregator/view``            aggregator -> whoever watches: View

Every message may come twice, late, out of order or never. A transfer is announced by its :class:`TransferManifest`
(inside Offer or UpdateReady); whoever receives it pulls chunks by bitmap with :class:`Request`.
"""

from typing import Annotated, TypeVar, Union, get_args

import msgspec
from msgspec import Meta

from fleetune.device_runtime.contracts.fields import (
    CHUNK_BYTES,
    CLASSES_MAX,
    FIGURE_MAX,
    MESSAGE_BYTES_MAX,
    TRANSFER_BYTES_MAX,
    VERSION,
    WATCHED_DEVICES_MAX,
    WATCHED_ROUNDS_MAX,
    Count,
    Degrees,
    Held,
    Megabytes,
    Seconds,
    SecondsLeft,
    Share,
    Shown,
    Stats,
    TaskId,
    Text,
    Word,
)
from fleetune.device_runtime.contracts.mask_messages import (
    MaskAsk,
    MaskGroup,
    MaskInbox,
    MaskKeys,
    MaskReveal,
    MaskShares,
)
from fleetune.device_runtime.contracts.work import FULL, LocalWork, SumGrid
from fleetune.device_runtime.errors import WireError, one_line
from fleetune.device_runtime.prepared import prepared

CAUSES = ("memory", "work", "")
"""Why a device declines."""
ROLES = ("train", "evaluate")
"""What a device may be in a job for."""
PHASES = ("idle", "fetching", "training", "evaluating", "masking", "delivering", "")
"""What a device may be at; while its rules forbid it to work it is ``paused`` besides."""
LOOK_S = 60.0
"""Who said Look so long ago looks no more."""


class TransferManifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a transfer holds. ``chunk_digests`` is 8 bytes of SHA-256 per chunk, concatenated; ``sha256`` is of the whole."""

    size_bytes: Annotated[int, Meta(ge=0, le=TRANSFER_BYTES_MAX)]
    chunk_bytes: Count
    chunk_digests: Annotated[bytes, Meta(max_length=64 * 1024)]
    sha256: Word


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
    listens: bool = False
    """It can take chunks that are published once for all who want them."""
    connection: Word = ""
    """Another for each connection of each start: what was on its way over an earlier one is lost. Empty: it may be."""


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
    mask_group: Word = ""
    """Of codec ``masked``: the group for which the device's keys are to be made; another for each attempt of a round."""
    shared: Word = ""
    """Stream in which ``adapter`` is published once for all who want it now; empty: in none, or the device cannot listen."""
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
    shared: Word = ""
    """Stream whose topic, of the part that has these chunks, the device listens on; empty: to the device alone."""


class Chunk(msgspec.Struct, frozen=True, kw_only=True, tag="chunk"):
    """One chunk of transfer ``sha256``."""

    v: int = VERSION
    sha256: Word
    index: Count
    data: Annotated[bytes, Meta(max_length=CHUNK_BYTES)]


class Finished(msgspec.Struct, frozen=True, kw_only=True, tag="finished"):
    """The job is over, or the device is not wanted: it may stop."""

    v: int = VERSION
    job: Word
    reason: Text = ""
    is_error: bool = False
    """The device cannot take part as it is."""


class DeviceStatus(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="device_status"):
    """Retained under the device's status topic; the last will says offline. What has its default is left out, but for ``v``."""

    v: int = msgspec.field(default_factory=lambda: VERSION)
    device_id: Word
    online: bool
    paused: Text = ""
    """Why its own rules forbid it to work now; empty if they do not. It hears and answers all the same."""
    session: Word = ""
    """Another with every start: a device that finds a status of another session under its own topic has a namesake."""
    phase: Word = ""
    """What it is at, one of :data:`PHASES`; empty, with all that follows, where it tells nothing of that: nobody looks, or its
    owner does not want it."""
    round: Count = 0
    """Of the work that it has, or had last."""
    step: Count = 0
    """Steps of it that are done."""
    steps: Count = 0
    """Of how many; 0 where that is not known."""
    step_s: Seconds = 0.0
    """Seconds that a step takes of late; 0 before the first."""
    left_s: SecondsLeft = 0.0
    """Seconds left until its round closes, as far as it knows; 0 for no deadline."""
    memory_mb: Megabytes = 0.0
    """Resident memory of its process, 10^6 bytes; 0 where that is not known."""
    temperature_c: Degrees = 0.0
    """Of the hottest part that it can read, degrees Celsius; 0 where that is not known."""
    mb_sent: Megabytes = 0.0
    """Payload of its messages since its start, 10^6 bytes."""
    mb_received: Megabytes = 0.0
    software: Word = ""
    """Version of fleetune there."""
    said: Text = ""
    """What was refused or declined last, and why."""


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
    tell_every_s: Seconds = 0.0
    """Somebody looks: a device says what it is at about so often, in its status; 0: nobody does."""


class Look(msgspec.Struct, frozen=True, kw_only=True, tag="look"):
    """Somebody watches the job, for the next :data:`LOOK_S` seconds; said again while it is so."""

    v: int = VERSION
    rounds_from: Count = 0
    """The first round whose figures are wanted."""


class RoundFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a round that is over; 0 is the time before the first, with the adapter as exported."""

    round: Count
    devices: Count
    seconds: Seconds = 0.0
    mb_down: Megabytes = 0.0
    """Payload of all chunks sent to devices, 10^6 bytes."""
    mb_up: Megabytes = 0.0
    measured: Stats = {}
    """``loss`` and a score over the evaluating devices (``accuracy``, or what the model is judged by: ``exact_match``, ``r2``,
    ``perplexity``), ``train_loss`` of those that trained, ``epsilon``; what was not measured is not in it."""


class View(msgspec.Struct, frozen=True, kw_only=True, tag="view"):
    """How a job stands: the answer to a Look."""

    v: int = VERSION
    job: Word
    session: Word
    software: Word = ""
    """Version of fleetune there."""
    round: Count
    """Number of the open round, or of the last one closed."""
    num_rounds: Count
    """In all."""
    version: Count
    is_open: bool
    """Whether a round is open."""
    left_s: SecondsLeft = 0.0
    """Seconds until the open round's deadline; 0 for none."""
    num_pending: Count = 0
    """Devices that the open round waits for."""
    num_accepted: Count = 0
    num_refused: Count = 0
    pending: Annotated[list[Word], Meta(max_length=WATCHED_DEVICES_MAX)] = []
    """Some of them, by name."""
    left_out: Annotated[dict[Word, Count], Meta(max_length=WATCHED_DEVICES_MAX)] = {}
    """Devices that are not asked for what their updates were, and the last round of it."""
    dropped: Count = 0
    """Messages that came faster than the aggregator could take them, since its start."""
    figures: Annotated[list[RoundFigures], Meta(max_length=WATCHED_ROUNDS_MAX)] = []
    """The oldest that the Look asks for and that are kept, in order."""


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
    Look,
    View,
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
_decoder: "msgspec.msgpack.Decoder[Message]" = msgspec.msgpack.Decoder(prepared(Message))


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


def device_topic(job: str, device_id: str, leaf: str) -> str:
    """Topic of one device; ``leaf`` is up, down or status, ``device_id`` may be the wildcard ``+``."""
    return f"fleetune/v1/{job}/device/{device_id}/{leaf}"


def aggregator_topic(job: str, leaf: str = "status") -> str:
    """Topic of the aggregator: of its retained status, or where ``look`` or ``view`` is said."""
    return f"fleetune/v1/{job}/aggregator/{leaf}"


def shared_topic(job: str, stream: str, part: int | str) -> str:
    """Topic of one part of a stream, as :mod:`fleetune.device_runtime.contracts.parts` has them."""
    return f"fleetune/v1/{job}/shared/{stream}/{part}"
