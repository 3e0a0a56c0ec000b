"""What an agent needs of a trainer and an evaluation, and no more: a simulation or a test brings its own."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.work import LocalWork


class Stepped(Protocol):
    """What a training step reports."""

    @property
    def loss(self) -> float:
        """Mean loss of the batch."""

    @property
    def active_layers(self) -> float:
        """Layers that ran."""

    @property
    def seconds(self) -> float:
        """How long it took."""


class Training(Protocol):
    """One local run, resumable; :class:`fleetune.device_runtime.training.trainer.Trainer` is one."""

    @property
    def done(self) -> bool:
        """Whether every step is done."""

    @property
    def step_index(self) -> int:
        """Steps done."""

    @property
    def history(self) -> Sequence[Stepped]:
        """What every step done reported."""

    @property
    def stats(self) -> Mapping[str, float]:
        """More figures for the update, all finite, beside those of the history."""

    @property
    def adapter(self) -> Arrays:
        """The tensors as trained so far, float32."""

    @property
    def effective_samples(self) -> float:
        """Samples behind the steps done, where those that outweigh the others count for fewer; asked only under a contract."""

    @property
    def personal(self) -> Collection[str]:
        """Names of the tensors that the work keeps on the device, after the steps done; asked only of work with ``personal``."""

    def measure(self, adapter: Arrays) -> "Measured | None":
        """Measure an adapter on the samples held out of training; None if none are. Asked only of work with ``personal``."""

    def step(self) -> Stepped:
        """Do one step."""

    def save(self, path: Path) -> None:
        """Write a checkpoint."""

    def restore(self, path: Path) -> None:
        """Go on from a checkpoint; StateError if it is damaged, ConfigError if it is of something else."""


class Measured(Protocol):
    """What an evaluation reports."""

    @property
    def loss(self) -> float:
        """Mean loss."""

    @property
    def accuracy(self) -> float:
        """Share of right answers."""

    @property
    def num_samples(self) -> int:
        """Samples measured."""


class Workbench(NamedTuple):
    """What a device works with."""

    start: Callable[[LocalWork, Arrays], Training]
    evaluate: Callable[[LocalWork, Arrays], Measured]
    num_samples: int
    class_sums: Callable[[LocalWork, Arrays], tuple[Arrays, Mapping[str, float]]] | None = None
    """Sums for a class-mean head, by the names in ``contracts.class_means``, with the ``seconds`` that they took and the
    ``samples`` in them; None where nothing makes them."""
    keep: Callable[[Arrays], object] = lambda adapter: None
    """Told the device's own model after each run that keeps layers: the version worked from with the personal layers over it."""
    data: str = ""
    """Digest of the samples; empty where they never change."""
    histogram: Callable[[], Sequence[int]] = tuple
    """Gives the samples of each class, if the aggregator may be told; nothing if not, and where samples have no class."""
