"""When a virtual device is there: drop-outs, on and off times, pauses. Pure functions of seed, device, round and virtual time."""

from typing import Annotated, NamedTuple

import msgspec

from fleetune.device_runtime.options import Option
from fleetune.toolkit.simulation.chance import chance


class Availability(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How reliable devices are; by default they are always there."""

    dropout: Annotated[
        float | tuple[float, ...],
        Option(
            "chance that a device vanishes in the middle of a round's work; or a list of it, round by round, whose last stays",
            at_least=0,
            at_most=1,
        ),
    ] = 0.0
    pause: Annotated[
        float, Option("chance that a device pauses once in a round's work", at_least=0, at_most=1)
    ] = 0.0
    pause_s: Annotated[float, Option("mean length of a pause, drawn exponentially", at_least=0)] = 60.0
    period_s: Annotated[
        float, Option("each device is away once in every such period; 0 for never away", at_least=0)
    ] = 0.0
    on_share: Annotated[float, Option("share of a period that it is there", above=0, at_most=1)] = 1.0


class Interruption(NamedTuple):
    """What befalls a round's work of a device."""

    at: float
    """Share of the work that is done by then, 0 to below 1."""
    seconds: float
    """How long it pauses; infinite where it vanishes."""


def dropout(availability: Availability, *, seed: int, device: int, round_number: int) -> Interruption | None:
    """Draw whether the device vanishes in this round, and when; None if it stays."""
    wanted = dropout_rate(availability, round_number)
    if not wanted:
        return None
    happens, at = chance(seed, "dropout", device, round_number).random(2)
    return Interruption(float(at), float("inf")) if happens < wanted else None


def dropout_rate(availability: Availability, round_number: int) -> float:
    """Return the chance that a device vanishes in a round, from 1; the last of a list stays for all rounds after it."""
    rates = availability.dropout
    if not isinstance(rates, tuple):
        return rates
    return rates[min(max(round_number, 1), len(rates)) - 1] if rates else 0.0


def pause(availability: Availability, *, seed: int, device: int, round_number: int) -> Interruption | None:
    """Draw whether the device pauses in this round, when, and for how long; None if it does not."""
    if not availability.pause:
        return None
    draws = chance(seed, "pause", device, round_number)
    happens, at = draws.random(2)
    seconds = float(draws.exponential(availability.pause_s))
    return Interruption(float(at), seconds) if happens < availability.pause else None


def is_there(availability: Availability, time_s: float, *, seed: int, device: int) -> bool:
    """Tell whether a device is there at a virtual time."""
    return not _away(availability, time_s, seed, device)


def back_at(availability: Availability, time_s: float, *, seed: int, device: int) -> float:
    """Return the first virtual time from ``time_s`` on, in seconds, at which a device is there."""
    return _away(availability, time_s, seed, device) or time_s


def leaves_at(availability: Availability, time_s: float, *, seed: int, device: int) -> float:
    """Return when a device that is there leaves next, in virtual seconds; infinite if it never does."""
    if not _comes_and_goes(availability):
        return float("inf")
    number = int(time_s // availability.period_s)
    starts = (_absence(availability, n, seed, device)[0] for n in (number, number + 1))
    return next(start for start in starts if start >= time_s)


def _away(availability: Availability, time_s: float, seed: int, device: int) -> float:
    """When the absence that ``time_s`` lies in ends; 0 if it lies in none."""
    if not _comes_and_goes(availability):
        return 0.0
    start, end = _absence(availability, int(time_s // availability.period_s), seed, device)
    return end if start <= time_s < end else 0.0


def _absence(availability: Availability, number: int, seed: int, device: int) -> tuple[float, float]:
    """The one absence of a period: wholly inside it, so that a period needs no look at its neighbours."""
    length = (1 - availability.on_share) * availability.period_s
    slack = availability.on_share * availability.period_s
    start = number * availability.period_s + slack * chance(seed, "absence", device, number).random()
    return start, start + length


def _comes_and_goes(availability: Availability) -> bool:
    return availability.period_s > 0 and availability.on_share < 1
