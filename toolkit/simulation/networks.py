"""Bandwidth and latency of a virtual device's network: pure functions of seed, device and virtual time."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from math import isfinite
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from fleetune.device_runtime.data.records import read_records
from fleetune.device_runtime.errors import DataError
from fleetune.device_runtime.options import Option
from fleetune.toolkit.simulation.chance import chance

Rates = Callable[[float], tuple[float, float]]
"""Virtual time in seconds -> (down, up) in bytes a second, both above 0."""


class NetworkModel(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a network carries at its median, and how much that varies."""

    down_bytes_s: Annotated[float, Option("bytes a second towards the device", above=0)]
    up_bytes_s: Annotated[float, Option("bytes a second from the device", above=0)]
    latency_s: Annotated[float, Option("one way, in seconds", at_least=0)] = 0.0
    sigma: Annotated[
        float, Option("of the lognormal factor on the bandwidth of a time slot", at_least=0, at_most=3)
    ] = 0.0
    slot_s: Annotated[float, Option("length of a time slot, in seconds", above=0)] = 30.0
    source: Annotated[str, Option("where the figures are from")] = ""
    estimated: Annotated[tuple[str, ...], Option("fields that are nobody's measurement")] = ()


class Network(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which network the devices have."""

    model: Annotated[str, Option("network of all devices; empty: of each, as its profile says")] = ""
    trace: Annotated[
        str,
        Option(
            "CSV of seconds, down_bytes_s, up_bytes_s, repeated: bandwidth of all devices; latency is the model's"
        ),
    ] = ""


class Slot(msgspec.Struct, frozen=True, kw_only=True):
    """A line of a trace: the bandwidth from ``seconds`` on."""

    seconds: float
    down_bytes_s: float
    up_bytes_s: float


def rates(model: NetworkModel, *, seed: int, device: int) -> Rates:
    """Make a device's bandwidth: the median times a lognormal factor, drawn anew for each time slot, down and up alike."""
    if not model.sigma:
        return lambda time_s: (model.down_bytes_s, model.up_bytes_s)

    @lru_cache(maxsize=1)
    def of_slot(slot: int) -> tuple[float, float]:
        draws = chance(seed, "network", device, slot)
        factor = float(np.exp(model.sigma * draws.standard_normal()))
        return model.down_bytes_s * factor, model.up_bytes_s * factor

    def at(time_s: float) -> tuple[float, float]:
        return of_slot(int(time_s // model.slot_s))

    return at


def trace_rates(slots: Sequence[Slot], *, seed: int, device: int) -> Rates:
    """Make a device's bandwidth from a trace that is repeated; each device begins at a place of its own, which is drawn."""
    starts = [slot.seconds for slot in slots]
    period = starts[-1] + (starts[-1] - starts[-2] if slots[1:] else 1.0)
    offset = chance(seed, "network", device).random() * period

    def at(time_s: float) -> tuple[float, float]:
        slot = slots[bisect_right(starts, (time_s + offset) % period) - 1]
        return slot.down_bytes_s, slot.up_bytes_s

    return at


def read_trace(path: Path) -> list[Slot]:
    """Read a trace. The last line lasts as long as the one before it.

    Raises:
        DataError: not such a file, times that do not rise from 0, or a bandwidth that is not above 0; names the line.
    """
    slots = []
    for source, line in read_records(path, _Line):
        try:
            slot = Slot(**{name: float(getattr(line, name)) for name in Slot.__struct_fields__})
        except ValueError as exc:
            raise source.error(str(exc)) from exc
        if not (isfinite(sum(msgspec.structs.astuple(slot))) and min(slot.down_bytes_s, slot.up_bytes_s) > 0):
            raise source.error(f"{slot}: expected finite numbers, bandwidths above 0")
        slots.append(slot)
    starts = [slot.seconds for slot in slots]
    if starts[0] or any(later <= earlier for earlier, later in pairwise(starts)):
        raise DataError(f"{path}: seconds must rise from 0")
    return slots


class _Line(msgspec.Struct, frozen=True, kw_only=True):
    """A line as CSV or JSON has it."""

    seconds: str | float
    down_bytes_s: str | float
    up_bytes_s: str | float


def _mbit(number: float) -> float:
    return number * 1e6 / 8


MODELS: dict[str, NetworkModel] = {
    "ethernet": NetworkModel(
        down_bytes_s=_mbit(941),
        up_bytes_s=_mbit(941),
        latency_s=0.0005,
        source="iperf3 of a Pi: https://mpr-projects.com/index.php/2023/12/15/rpi-nas-part-3-network-connections/",
        estimated=("latency_s",),
    ),
    "wifi": NetworkModel(
        down_bytes_s=_mbit(40),
        up_bytes_s=_mbit(40),
        latency_s=0.003,
        sigma=0.3,
        estimated=("down_bytes_s", "up_bytes_s", "latency_s", "sigma"),
    ),
    "5g": NetworkModel(
        down_bytes_s=_mbit(166.13),
        up_bytes_s=_mbit(21.08),
        latency_s=0.015,
        sigma=0.5,
        source="Ookla, median of the world, Q3 2021: https://ooklacommain.kinsta.cloud/articles/author/isla-mcketta/page/3",
        estimated=("latency_s", "sigma"),
    ),
    "lte": NetworkModel(
        down_bytes_s=_mbit(27.33),
        up_bytes_s=_mbit(8.63),
        latency_s=0.03,
        sigma=0.5,
        source="Ookla, mean of US mobile, 2018: "
        "https://www.radioworld.com/trends-1/ookla-says-t-mobile-has-fastest-download-speed-of-all-u-s-carriers",
        estimated=("latency_s", "sigma"),
    ),
    "3g": NetworkModel(
        down_bytes_s=_mbit(1.6),
        up_bytes_s=_mbit(0.75),
        latency_s=0.075,
        sigma=0.5,
        source="the preset of WebPageTest and Lighthouse: https://github.com/GoogleChrome/lighthouse/blob/main/docs/throttling.md",
        estimated=("sigma",),
    ),
}
