"""Who holds which example: pure functions ``(subject, partition, seed) -> one array of indices a device``.

Every example is used at most once; indices are in rising order. Draws are numpy's (see :mod:`chance`): by the seed the same on
one machine, and not promised across versions of numpy.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.data.npz_file import read_npz
from fleetune.device_runtime.data.records import read_records
from fleetune.device_runtime.errors import ConfigError, DataError, choices, some
from fleetune.device_runtime.options import Option
from fleetune.device_runtime.tables import Table
from fleetune.toolkit.simulation.chance import chance
from fleetune.toolkit.simulation.user_code import load_function

_DRAWS = 100
"""So often a Dirichlet partition is drawn before small devices are filled up from large ones."""
SIZES = ("lognormal", "power-law")


class Partition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How examples are shared out."""

    kind: Annotated[str, Option("how", table="partition")]
    devices: Annotated[
        int, Option("devices in the fleet; 0 with kind 'by': one for each value", at_least=0)
    ] = 0
    min_samples: Annotated[int, Option("examples that each device has at least", at_least=0)] = 1
    alpha: Annotated[
        float, Option("dirichlet: concentration; the smaller, the more the labels are skewed", above=0)
    ] = 1.0
    column: Annotated[str, Option("by: column of the data that says whose an example is")] = ""
    file: Annotated[str, Option("by: file that has the column, row by row as the data; empty: the data")] = ""
    sizes: Annotated[str, Option("quantity: how sizes differ", choices=SIZES)] = "lognormal"
    spread: Annotated[
        float, Option("quantity: sigma of the lognormal, or exponent of the power law", at_least=0)
    ] = 1.0
    classes: Annotated[int, Option("shards: classes a device", at_least=1)] = 2
    code: Annotated[str, Option("code: 'FILE.py:FUNCTION', the user's own")] = ""


class Subject(NamedTuple):
    """What is shared out."""

    labels: Indices
    """Class of each example, int64 (N,)."""
    columns: Callable[[str], Sequence[object]]
    """A column of the data by name, one value for each example."""


class Share(NamedTuple):
    """What one device got, for reports."""

    samples: int
    classes: int
    """Different ones; 0 of an empty device, which has nothing to train on."""


Maker = Callable[[Subject, Partition, int], list[Indices]]


class Kind(NamedTuple):
    """A way to share out."""

    make: Maker
    uses: tuple[str, ...] = ()
    """Fields that it reads beside ``kind``, ``devices`` and ``min_samples``."""


def partition(subject: Subject, wanted: Partition, *, seed: int) -> list[Indices]:
    """Share examples out: int64 arrays of indices in rising order, one a device; none twice.

    Raises:
        ConfigError: settings that do not fit, too few examples for ``min_samples``, or user code that breaks the law.
        DataError: a column that is not there.
    """
    if found := partition_problems(wanted):
        raise ConfigError("partition: " + "; ".join(found))
    needed = wanted.devices * wanted.min_samples
    if needed > len(subject.labels):
        raise ConfigError(
            f"partition: {wanted.devices} devices of at least {wanted.min_samples} examples need {needed}; "
            f"there are {len(subject.labels)}"
        )
    made = KINDS[wanted.kind].make(subject, wanted, seed)
    return [np.sort(np.asarray(part, np.int64)) for part in made]


def partition_problems(wanted: Partition) -> list[str]:
    """Return what in the settings does not fit together."""
    if wanted.kind not in KINDS:
        return [f"no partition {wanted.kind!r}; have: {choices(KINDS)}"]
    given, default = msgspec.to_builtins(wanted), msgspec.to_builtins(Partition(kind=wanted.kind))
    useful = {"kind", "devices", "min_samples", *KINDS[wanted.kind].uses}
    found = [
        f"kind {wanted.kind!r} has no use for {name}; kinds that have: {choices(_users(name))}"
        for name in given
        if name not in useful and given[name] != default[name]
    ]
    needed = [name for name in ("column", "code") if name in useful and not given[name]]
    found += [f"kind {wanted.kind!r} needs {name}" for name in needed]
    if not wanted.devices and wanted.kind != "by":
        found.append("devices must be at least 1")
    return found


def shares(labels: Indices, parts: Sequence[Indices]) -> list[Share]:
    """Count what each device got."""
    return [Share(len(part), len(np.unique(labels[part]))) for part in parts]


def read_column(path: Path, name: str) -> list[str]:
    """Read one column of a data file as text: a field of its lines, or an array of an ``.npz``.

    Raises:
        DataError: the file cannot be read, or has no such column.
    """
    if path.suffix == ".npz":
        return [str(value) for value in _npz_column(path, name).tolist()]
    kind = msgspec.defstruct("Column", [(name, str | int | float | bool)], frozen=True)
    return [str(getattr(record, name)) for _, record in read_records(path, kind)]


def by_label(subject: Subject, wanted: Partition, seed: int) -> list[Indices]:
    """Share each class out by a draw of Dirichlet(alpha) over the devices.

    A partition with a device below ``min_samples`` is drawn again, up to 100 times; then small devices are filled up, one
    example at a time, each from the device that has most (its class of most examples, so that few classes are lost).

    Source: Hsu, Qi and Brown, arXiv 1909.06335; drawing again as in NIID-Bench, arXiv 2102.02079. The filling up is ours.
    """
    draws = chance(seed, "partition")
    groups = [np.flatnonzero(subject.labels == label) for label in np.unique(subject.labels)]
    for _ in range(_DRAWS):
        owners = _deal(groups, wanted, draws)
        if np.bincount(owners, minlength=wanted.devices).min() >= wanted.min_samples:
            break
    order = np.argsort(owners, kind="stable")
    ends = np.cumsum(np.bincount(owners, minlength=wanted.devices))
    return _filled(np.split(order, ends[:-1]), subject.labels, wanted.min_samples)


def by_column(subject: Subject, wanted: Partition, seed: int) -> list[Indices]:
    """Give whole values of a column (speakers, roles) to devices, the largest first, each to the device that has least.

    ``devices`` 0: a device for each value, in the order of their names.
    """
    values = np.asarray(list(map(str, subject.columns(wanted.column))))
    if len(values) != len(subject.labels):
        raise DataError(f"column {wanted.column!r}: {len(values)} values for {len(subject.labels)} examples")
    groups = [np.flatnonzero(values == name) for name in np.unique(values)]
    if wanted.devices > len(groups):
        raise ConfigError(
            f"partition: column {wanted.column!r} has {len(groups)} values, which do not reach {wanted.devices} devices"
        )
    parts = _grouped(groups, wanted.devices) if wanted.devices else groups
    small = [str(i) for i, part in enumerate(parts) if len(part) < wanted.min_samples]
    if small:
        raise ConfigError(
            f"partition: devices {some(small)} have fewer than {wanted.min_samples} examples: ask for fewer devices or less"
        )
    return parts


def by_quantity(subject: Subject, wanted: Partition, seed: int) -> list[Indices]:
    """Deal shuffled examples by sizes that differ: lognormal with sigma ``spread``, or ``rank ** -spread`` in a random order."""
    draws = chance(seed, "partition")
    count = wanted.devices
    if wanted.sizes == "lognormal":
        weights = draws.lognormal(0.0, wanted.spread, count)
    else:
        weights = draws.permutation(np.arange(1, count + 1, dtype=np.float64) ** -wanted.spread)
    spare = len(subject.labels) - count * wanted.min_samples
    ends = np.rint(np.cumsum(weights) / weights.sum() * spare).astype(np.int64)
    cuts = ends + wanted.min_samples * np.arange(1, count + 1)
    return np.split(draws.permutation(len(subject.labels)), cuts[:-1])


def by_shards(subject: Subject, wanted: Partition, seed: int) -> list[Indices]:
    """Cut examples in the order of their labels into ``devices * classes`` shards and give each device ``classes`` of them.

    A device has about that many classes: a shard may reach over the border of two.

    Source: McMahan et al., AISTATS 2017, section 3, where it is two shards a client.
    """
    draws = chance(seed, "partition")
    shuffled = draws.permutation(len(subject.labels))
    ordered = shuffled[np.argsort(subject.labels[shuffled], kind="stable")]
    shards = np.array_split(ordered, wanted.devices * wanted.classes)
    hands = draws.permutation(len(shards)).reshape(wanted.devices, wanted.classes)
    parts = [np.concatenate([shards[i] for i in hand]) for hand in hands]
    return _filled(parts, subject.labels, wanted.min_samples)


def evenly(subject: Subject, wanted: Partition, seed: int) -> list[Indices]:
    """Deal shuffled examples in equal parts: labels and sizes alike everywhere."""
    return np.array_split(chance(seed, "partition").permutation(len(subject.labels)), wanted.devices)


def by_code(subject: Subject, wanted: Partition, seed: int) -> list[Indices]:
    """Call the user's ``FUNCTION(labels, column, num_devices, seed)``, which returns a list of indices for each device.

    ``column("speaker")`` gives that column of the data, one text for each example.
    """
    function = load_function(wanted.code)
    try:
        made = function(subject.labels, subject.columns, wanted.devices, seed)
        parts = [np.asarray(part, np.int64).reshape(-1) for part in made]
    except Exception as exc:
        raise ConfigError(
            f"{wanted.code}: no list of indices for each device: {type(exc).__name__}: {exc}"
        ) from exc
    if problems := list(_unlawful(parts, len(subject.labels), wanted)):
        raise ConfigError(f"{wanted.code}: " + "; ".join(problems))
    return parts


def _deal(groups: Sequence[Indices], wanted: Partition, draws: np.random.Generator) -> Indices:
    """Draw the device of each example, int64 (N,)."""
    owners = np.empty(sum(map(len, groups)), np.int64)
    for group in groups:
        portions = _dirichlet(draws, wanted.alpha, wanted.devices)
        ends = np.rint(np.cumsum(portions) * len(group)).astype(np.int64)
        counts = np.diff(ends[:-1], prepend=0, append=len(group))
        owners[draws.permutation(group)] = np.repeat(np.arange(wanted.devices), counts)
    return owners


def _dirichlet(draws: np.random.Generator, alpha: float, count: int) -> NDArray[np.float64]:
    """Draw shares; where all of them are too small for a number (alpha near 0), one device has it all, as in the limit."""
    portions = draws.dirichlet(np.full(count, alpha))
    return portions if np.isfinite(portions).all() else np.eye(count)[draws.integers(count)]


def _filled(parts: list[Indices], labels: Indices, min_samples: int) -> list[Indices]:
    if min(map(len, parts)) >= min_samples:
        return parts
    hands = [list(part) for part in parts]
    for hand in hands:
        while len(hand) < min_samples:
            giver = max(hands, key=len)
            own = labels[giver]
            most = int(np.bincount(own - labels.min()).argmax()) + labels.min()
            hand.append(giver.pop(int(np.flatnonzero(own == most)[-1])))
    return [np.asarray(hand, np.int64) for hand in hands]


def _grouped(groups: Sequence[Indices], count: int) -> list[Indices]:
    hands: list[list[Indices]] = [[] for _ in range(count)]
    for group in sorted(groups, key=len, reverse=True):
        min(hands, key=lambda hand: sum(map(len, hand))).append(group)
    return [np.concatenate(hand) for hand in hands]


def _unlawful(parts: Sequence[Indices], count: int, wanted: Partition) -> Iterator[str]:
    if len(parts) != wanted.devices:
        yield f"{len(parts)} lists for {wanted.devices} devices"
    taken = np.concatenate([np.zeros(0, np.int64), *parts])
    if outside := sorted({int(i) for i in taken if not 0 <= i < count}):
        yield f"index {outside[0]}; expected 0 to {count - 1}"
    if len(np.unique(taken)) < len(taken):
        yield "an example is given twice"
    small = [str(i) for i, part in enumerate(parts) if len(part) < wanted.min_samples]
    if small:
        yield f"devices {some(small)} have fewer than min_samples ({wanted.min_samples})"


def _npz_column(path: Path, name: str) -> Array:
    def problems(forms: Arrays) -> list[str]:
        return [] if name in forms else [f"no column {name!r}; have: {choices(forms)}"]

    return read_npz(path, problems=problems)[name]


def _users(field: str) -> list[str]:
    return [name for name, kind in KINDS.items() if field in kind.uses]


KINDS: Table[Kind] = Table(
    "partition",
    {
        "dirichlet": Kind(by_label, uses=("alpha",)),
        "by": Kind(by_column, uses=("column", "file")),
        "quantity": Kind(by_quantity, uses=("sizes", "spread")),
        "shards": Kind(by_shards, uses=("classes",)),
        "iid": Kind(evenly),
        "code": Kind(by_code, uses=("code",)),
    },
)
