"""What a field of the wire may hold: its bounds, and the names that may stand in a topic."""

import re
from typing import Annotated, NamedTuple

from msgspec import Meta

from fleetune.device_runtime.errors import ConfigError

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
MEGABYTES_MAX = 1e9
WATCHED_ROUNDS_MAX = 256
"""Rounds in one answer to who looks."""
WATCHED_DEVICES_MAX = 256
"""Devices that one answer to who looks names of a kind."""
FIGURE_MAX = 1e39
"""A loss or another statistic is at most this, which no float32 exceeds; a store keeps none beyond it."""
STATS_MAX = 32
"""Statistics of one update."""
CLASSES_MAX = 4096
"""Classes of one label histogram."""
CERTIFICATE_BYTES_MAX = 4096
"""Of a device's certificate, DER."""
NEIGHBOURS_MAX = 512
"""Devices that one device masks with: their keys and shares fit a message."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_PRINTABLE = "^[^\x00-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]*\\Z"
"""Without what moves a cursor."""
_ASCII = r"^[ -~]*\Z"


class Shown(NamedTuple):
    """Marks text for people: cut to ``chars_max`` and made printable when it is decoded, not refused."""

    chars_max: int


Count = Annotated[int, Meta(ge=0, le=COUNT_MAX)]
Held = Annotated[int, Meta(ge=-1, le=COUNT_MAX)]
"""A version, -1 for none."""
Word = Annotated[str, Meta(max_length=64, pattern=_ASCII)]
"""A name or a digest: printable ASCII."""
CLASS_WEIGHTS_MAX = 4096
"""Characters of the weights of classes."""
ClassWeights = Annotated[str, Meta(max_length=CLASS_WEIGHTS_MAX, pattern=_PRINTABLE)]
"""Weights by the names of classes, in whatever language."""
TaskId = Annotated[str, Meta(max_length=128, pattern=_ASCII)]
Share = Annotated[float, Meta(ge=0, le=1)]
Seconds = Annotated[float, Meta(ge=0, le=SECONDS_MAX)]
SecondsLeft = Annotated[float, Meta(ge=-SECONDS_MAX, le=SECONDS_MAX)]
"""Until a time; below 0 it is past."""
Megabytes = Annotated[float, Meta(ge=0, le=MEGABYTES_MAX)]
Degrees = Annotated[float, Meta(ge=-273.15, le=1000)]
Text = Annotated[str, Shown(REASON_CHARS_MAX)]
Stats = Annotated[dict[Word, float], Meta(max_length=STATS_MAX)]
Certificate = Annotated[bytes, Meta(max_length=CERTIFICATE_BYTES_MAX)]
CertificateSignature = Annotated[bytes, Meta(max_length=1024)]
Key32 = Annotated[bytes, Meta(min_length=32, max_length=32)]
Places = Annotated[list[Count], Meta(max_length=NEIGHBOURS_MAX + 1)]
"""Places in a group of devices that are summed together."""


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
