"""From a configuration to its devices: who holds which samples, how quick each is, how it is connected, when it is there."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Indices
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.errors import DataError, TooLittleMemory
from fleetune.toolkit.simulation.chance import chance
from fleetune.toolkit.simulation.config import SimulationConfig
from fleetune.toolkit.simulation.jobs import Share
from fleetune.toolkit.simulation.links import Line
from fleetune.toolkit.simulation.memory import MemoryModel
from fleetune.toolkit.simulation.networks import Rates, rates, read_trace, trace_rates
from fleetune.toolkit.simulation.partitions import Subject, partition, read_column
from fleetune.toolkit.simulation.profiles import Profile, assign


class DeviceSpec(NamedTuple):
    """One device of the fleet."""

    number: int
    """From 0."""
    name: str
    profile_name: str
    profile: Profile
    share: Share
    samples: int
    classes: int
    """Different ones among its samples."""
    line: Line


def fleet_of(config: SimulationConfig, train: Dataset) -> list[DeviceSpec]:
    """Make the devices of a configuration; ``train`` is all of its training data.

    Raises:
        ConfigError, DataError: the partition does not fit the data.
    """
    chosen = limited(train.num_samples, config.data.limit_train, config.seed, 0)
    labels = train.labels[chosen] if len(train.labels) else np.zeros(len(chosen), np.int64)
    subject = Subject(labels, lambda name: _column(config.column_file, name, train.num_samples, chosen))
    parts = partition(subject, config.partition, seed=config.seed)
    profiles = assign(config.fleet.profiles, [len(part) for part in parts], seed=config.seed)
    line_of = _lines(config)
    return [
        DeviceSpec(
            number,
            f"device-{number:05d}",
            profile,
            config.all_profiles[profile],
            Share.of(config.data.train, chosen[part], config.data.columns),
            len(part),
            len(np.unique(labels[part])),
            line_of(number, config.all_profiles[profile]),
        )
        for number, (part, profile) in enumerate(zip(parts, profiles, strict=True))
    ]


def who_is_unable(
    specs: Sequence[DeviceSpec],
    work: LocalWork,
    memory: MemoryModel,
    datasets: Callable[[Share, int], Dataset],
) -> dict[str, str]:
    """Return the devices with samples whose memory ``work`` does not fit, and the least that would do."""
    found = {}
    for spec in specs:
        try:
            if spec.samples:
                memory.fit(work, partial(datasets, spec.share, work.seq_len), spec.profile.memory_mb)
        except TooLittleMemory as exc:
            found[spec.name] = str(exc)
    return found


def told_of(specs: Sequence[DeviceSpec], unable: Mapping[str, str]) -> list[str]:
    """A line for each profile with devices that can do none of the work: how many, and the reason of the first."""
    lines = []
    for profile in sorted({spec.profile_name for spec in specs if spec.name in unable}):
        names = [spec.name for spec in specs if spec.profile_name == profile]
        out = [name for name in names if name in unable]
        lines.append(f"profile {profile}: {len(out)} of {len(names)} devices take no part: {unable[out[0]]}")
    return lines


def test_share(config: SimulationConfig, test: Dataset) -> Share:
    """The samples that versions are measured on."""
    chosen = limited(test.num_samples, config.data.limit_test, config.seed, 1)
    rows = chosen if len(chosen) < test.num_samples else None
    return Share.of(config.data.test, rows, config.data.columns)


def limited(count: int, limit: int, seed: int, place: int) -> Indices:
    """Indices of ``limit`` of ``count`` examples in rising order, drawn by the seed; 0 for all."""
    if not limit or limit >= count:
        return np.arange(count)
    return np.sort(chance(seed, "limit", place).permutation(count)[:limit])


def _column(path: Path, name: str, count: int, chosen: Indices) -> list[str]:
    """Values of the chosen of ``count`` examples; DataError if the file has not one for each."""
    values = read_column(path, name)
    if len(values) != count:
        raise DataError(f"{path}: column {name!r} has {len(values)} values, for {count} training examples")
    return [values[i] for i in chosen]


def _lines(config: SimulationConfig) -> Callable[[int, Profile], Line]:
    slots = read_trace(Path(config.network.trace)) if config.network.trace else None

    def of(number: int, profile: Profile) -> Line:
        model = config.all_networks[config.network.model or profile.network]
        bandwidth: Rates = (
            rates(model, seed=config.seed, device=number)
            if slots is None
            else trace_rates(slots, seed=config.seed, device=number)
        )
        return Line(bandwidth, model.latency_s)

    return of
