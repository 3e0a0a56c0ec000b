"""Bandwidth and latency of a virtual device's network: pure functions of seed, device and virtual time."""

from typing import Annotated, NamedTuple

import msgspec

from fleetune.device_runtime.options import Option


class NetworkModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a network carries at its median, and how much that varies."""

    down_bytes_s: Annotated[float, Option("bytes a second towards the device", above=0)]
    up_bytes_s: Annotated[float, Option("bytes a second from the device", above=0)]
    latency_s: Annotated[float, Option("one way, in seconds", at_least=0)] = 0.0
    sigma: Annotated[float, Option("of the lognormal factor on the bandwidth of a time slot", at_least=0)] = (
        0.0
    )
    slot_s: Annotated[float, Option("length of a time slot, in seconds", above=0)] = 30.0
    source: Annotated[str, Option("where the figures are from; 'estimate' where they are ours")] = ""


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which network the devices have."""

    model: Annotated[str, Option("network of all devices; empty: of each, as its profile says")] = ""
    trace: Annotated[
        str, Option("CSV of seconds, down_bytes_s, up_bytes_s, repeated; instead of a model")
    ] = ""


class Bandwidth(NamedTuple):
    """What a network carries at one time."""

    down_bytes_s: float
    up_bytes_s: float
    latency_s: float


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a trace: from ``seconds`` on, until the next line's."""

    seconds: float
    down_bytes_s: float
    up_bytes_s: float


MODELS: dict[str, NetworkModel] = {"wifi": NetworkModel(down_bytes_s=5e6, up_bytes_s=2.5e6)}
