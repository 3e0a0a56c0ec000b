"""Device profiles: how quickly a class of devices trains, what memory and power it has, and which network it is usually in.

A step's time on a device is its time on this machine times :func:`slowdown`, the ratio of two rates of matrix products: LoRA
training spends most of its time in them (``docs/lab.md``). What a profile has no published figure for is named in ``estimated``.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated

import msgspec
import numpy as np

from fleetune.device_runtime.errors import ConfigError, StateError
from fleetune.device_runtime.options import Option
from fleetune.toolkit.simulation.chance import chance

_HPL = "https://github.com/geerlingguy/top500-benchmark/issues"
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_MEASURE = """
import time
import numpy as np
a = np.ones((1024, 1024), np.float32)
def once():
    start = time.perf_counter()
    a @ a
    return time.perf_counter() - start
print(2 * 1024**3 / sorted(once() for _ in range(15))[7] / 1e9)
"""
"""The median of 15 products, so that neither a warm-up nor a busy moment decides."""


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A class of devices."""

    gflops: Annotated[
        float, Option("sustained fp32 GFLOP/s of matrix products, all cores together", at_least=0)
    ] = 0.0
    slowdown: Annotated[
        float, Option("instead of gflops: time of a step over that on one thread of this machine", at_least=0)
    ] = 0.0
    memory_mb: Annotated[float, Option("memory that training may take, in 10^6 bytes", above=0)] = 1e6
    active_w: Annotated[float, Option("watts while it trains", at_least=0)] = 0.0
    idle_w: Annotated[float, Option("watts while it waits", at_least=0)] = 0.0
    network: Annotated[str, Option("its usual network")] = "wifi"
    source: Annotated[str, Option("where the figures are from")] = ""
    estimated: Annotated[tuple[str, ...], Option("fields that are nobody's measurement")] = ()


def profile_problems(name: str, profile: Profile) -> list[str]:
    """Return what is wrong with a profile of the user's own."""
    if bool(profile.gflops) == bool(profile.slowdown):
        return [f"profiles.{name}: needs gflops or slowdown, and not both"]
    return []


def slowdown(profile: Profile, reference_gflops: float) -> float:
    """Return a device's step time over that of one thread of this machine, of ``reference_gflops`` by :func:`measure_gflops`.

    Raises:
        ConfigError: a rate that is not a number above 0.
    """
    if profile.slowdown:
        return profile.slowdown
    if not (np.isfinite(reference_gflops) and reference_gflops > 0 and profile.gflops > 0):
        raise ConfigError(
            f"rates of matrix products: {reference_gflops} here, {profile.gflops} there; expected above 0"
        )
    return reference_gflops / profile.gflops


def measure_gflops() -> float:
    """Measure fp32 GFLOP/s of 1024 x 1024 products by numpy on one thread, in a process of its own; half a second.

    Raises:
        StateError: the process does not end well.
    """
    environment = os.environ | _ONE_THREAD
    done = subprocess.run(  # numpy takes its number of threads when it is loaded
        [sys.executable, "-c", _MEASURE], env=environment, capture_output=True, text=True, check=False
    )
    try:
        return float(done.stdout)
    except ValueError as exc:
        raise StateError(
            f"matrix products could not be timed: {done.stderr.strip()[-200:] or done.returncode}"
        ) from exc


def energy_j(profile: Profile, *, active_s: float, total_s: float) -> float:
    """Return joules of a time in which the device trained for ``active_s`` and waited for the rest: a proxy, no measurement."""
    return profile.active_w * active_s + profile.idle_w * max(0.0, total_s - active_s)


def assign(parts: Mapping[str, float], sizes: Sequence[int], *, seed: int) -> list[str]:
    """Give each device a profile.

    Every profile gets its part of the fleet (largest remainders, ties by name), spread evenly over the devices in the order of
    their data: no profile gets all the large ones. Where in that order each begins is drawn.

    Args:
        parts: part of the fleet by profile: shares or numbers, scaled to the number of devices.
        sizes: number of samples of each device.
        seed: of the draw.
    """
    names = sorted(parts)
    counts = _counts([parts[name] for name in names], len(sizes))
    starts = chance(seed, "profiles").random(len(names))
    places = [
        ((i + start) / count, name)
        for name, count, start in zip(names, counts, starts, strict=True)
        for i in range(count)
    ]
    by_size = np.argsort(np.asarray(sizes), kind="stable")
    given = dict(zip(by_size.tolist(), (name for _, name in sorted(places)), strict=True))
    return [given[device] for device in range(len(sizes))]


def _counts(parts: Sequence[float], total: int) -> list[int]:
    exact = np.asarray(parts, np.float64) / sum(parts) * total
    counts = np.floor(exact).astype(np.int64)
    most = np.argsort(counts - exact, kind="stable")[: total - int(counts.sum())]
    counts[most] += 1
    found: list[int] = counts.tolist()
    return found


PROFILES: dict[str, Profile] = {
    "reference": Profile(slowdown=1.0, source="this machine, one thread"),
    "pi-4": Profile(
        gflops=23.8,
        memory_mb=3000,
        active_w=7.2,
        idle_w=2.3,
        source=f"twice its fp64 HPL, 11.889 GFLOP/s at 7.2 W: {_HPL}/13; idle: https://chipwired.com/raspberry-pi-power-use",
        estimated=("memory_mb",),
    ),
    "pi-5": Profile(
        gflops=60.5,
        memory_mb=6000,
        active_w=11.0,
        idle_w=3.3,
        source=f"twice its fp64 HPL, 30.249 GFLOP/s at 11 W: {_HPL}/18; idle 0.65 A: https://github.com/iiab/iiab/issues/4050",
        estimated=("memory_mb",),
    ),
    "jetson-nano": Profile(
        gflops=19.5,
        memory_mb=2500,
        active_w=6.8,
        idle_w=1.9,
        network="ethernet",
        source="4 Cortex-A57 at 1.479 GHz, 10 W at most: https://xiaopingtou.net/article-89752.html (NVIDIA's table); "
        "by core and GHz the rate of pi-4",
        estimated=("gflops", "memory_mb", "active_w", "idle_w"),
    ),
    "jetson-tx2": Profile(
        gflops=39.6,
        memory_mb=6000,
        active_w=10.0,
        idle_w=3.0,
        network="ethernet",
        source="4 Cortex-A57 and 2 Denver at 2.0 GHz (from memory); by core and GHz the rate of pi-4",
        estimated=("gflops", "memory_mb", "active_w", "idle_w"),
    ),
    "jetson-xavier-nx": Profile(
        gflops=48.0,
        memory_mb=6000,
        active_w=11.0,
        idle_w=4.0,
        network="ethernet",
        source="6 Carmel at 1.4 GHz, 8 fp32 FLOP a cycle (from memory), of which 0.72 as jetson-orin-nano",
        estimated=("gflops", "memory_mb", "active_w", "idle_w"),
    ),
    "jetson-orin-nano": Profile(
        gflops=104.0,
        memory_mb=6000,
        active_w=12.0,
        idle_w=5.0,
        network="ethernet",
        source="6 Cortex-A78AE at 1.51 GHz (https://github.com/ThomasKaiser/sbc-bench/issues/65), 7 to 25 W "
        "(https://github.com/golemfactory/yagna/issues/3405); the rate is that of an unnamed report of OpenBLAS on an Orin NX, "
        "92 fp64 GFLOP/s on 8 such cores at 2.0 GHz, by core and GHz and doubled",
        estimated=("gflops", "memory_mb", "active_w", "idle_w"),
    ),
    "phone-mid": Profile(
        gflops=38.0,
        memory_mb=1500,
        active_w=3.0,
        idle_w=0.5,
        source="2 Cortex-A76 and 6 Cortex-A55 (https://github.com/kdrag0n/freqbench/pull/27) at 2.4 GHz (from memory), half of "
        "the large cores' peak; a phone sheds 3 W (https://petewarden.com/2015/10/08/smartphone-energy-consumption)",
        estimated=("gflops", "memory_mb", "active_w", "idle_w"),
    ),
    "phone-good": Profile(
        gflops=96.0,
        memory_mb=3000,
        active_w=4.0,
        idle_w=0.5,
        source="Dimensity 9000+: 1 Cortex-X2 at 3.2 GHz and 3 Cortex-A710 at 2.85 GHz (from memory), 0.4 of their peak",
        estimated=("gflops", "memory_mb", "active_w", "idle_w"),
    ),
}
"""Rates are of CPUs: that is what the devices' onnxruntime uses."""
