"""Lines of 100 that an aggregator reads out of one device's updates, by what it offers and what the device's owner allows.

The device has a real engine (MiniLM, LoRA of rank 8) and 100 lines of the made-up household; the attack is in
``measuring.leaks``. Each setting is tried on a device without a contract and on one with the default contract.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from benchmarks.measuring.figures import chart_of, table
from benchmarks.measuring.leaks import SGD, Attacker, Device, Doubles, Line, lines_of, noisy, seeds_for
from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.device_runtime.terms.terms import Terms
from fleetune.device_runtime.training.machine import Machine
from fleetune.toolkit.export import export
from fleetune.toolkit.models import packaged_model
from fleetune.toolkit.utterances import LABELS, make_corpus, write_lines

LINES, SPEAKERS = 100, 4
NOBODYS = "something_else"
"""A label that the artifact has and no line."""
Say = Callable[[str], None]


class Setting(NamedTuple):
    """What the attacker does. Each batch of the device's lines is offered ``offers`` times, each time with other bait."""

    batch: int
    offers: int
    steps: int = 1
    """In each offer."""
    erased: bool = False
    """Whether weight decay erases all steps but the last."""
    most_change: float = Terms().most_change
    """Of a device with a contract; one without has none."""
    noise: float = 0.0
    """Gaussian, over the root mean square of a tensor's change."""
    share: float = 0.0
    """Of the lines that are to answer to a hook; 0 for plain bait."""


_BATCHES = ((1, 1), (2, 2), (4, 4), (8, 8), (16, 16), (32, 24), (40, 24), (64, 24))
SETTINGS: dict[str, Setting] = {
    **{f"batch {b} x {k}": Setting(b, k) for b, k in _BATCHES},
    **{f"batch 8 x {k}": Setting(8, k) for k in (1, 2, 4, 16)},
    **{f"batch 4 x 8: {s} even steps": Setting(4, 8, steps=s) for s in (2, 4, 8)},
    "batch 4 x 8: 8 steps 7 erased": Setting(4, 8, steps=8, erased=True),
    **{f"batch 4 x 4: change at most {c:g}": Setting(4, 4, most_change=c) for c in (1e-3, 1e-6)},
    **{f"batch 4 x 8: noise {n:g}": Setting(4, 8, noise=n) for n in (1e-4, 1e-3, 1e-2, 0.1, 1.0)},
    **{f"batch 1 x 1: noise {n:g}": Setting(1, 1, noise=n) for n in (0.01, 0.1, 1.0)},
    **{f"all x 40: a hook for {int(LINES * s)}": Setting(50, 40, share=s) for s in (0.01, 0.4)},
}  # fmt: skip


def measure(say: Say, *, only: Sequence[str] = (), threads: int = 1) -> dict[str, Any]:
    """One row a setting; ``only`` names settings."""
    if unknown := [name for name in only if name not in SETTINGS]:
        raise UnknownName(f"no setting {unknown[0]!r}; have: {choices(SETTINGS)}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        artifact, data, words = _prepare(folder, say)
        with Machine(open_artifact(artifact), Resources(threads=threads), folder=folder / "cache") as machine:
            rows = [*_rows(only or [*SETTINGS], partial(Siege, machine, artifact, data, words), say)]
    for line in table(rows):
        say(line)
    chart = chart_of("setting", rows, "no_contract", "defaults")
    return {"benchmark": "reconstruction", "lines": LINES, "rows": rows, "chart": chart}


def _prepare(folder: Path, say: Say) -> tuple[Path, Path, Path]:
    """The artifact, the private lines of one speaker, and those of the others, which the attacker knows."""
    corpus = make_corpus(0, num_train=LINES * SPEAKERS, num_test=60, num_speakers=SPEAKERS)
    own, *others = corpus.train.values()
    write_lines(folder / "own.jsonl", own)
    write_lines(folder / "others.jsonl", [line for lines in others for line in lines])
    labels = [*LABELS, NOBODYS]
    export(
        packaged_model(), task="sequence-classification", labels=labels, out=folder / "artifact", on_note=say
    )
    return folder / "artifact", folder / "own.jsonl", folder / "others.jsonl"


def _rows(
    names: Sequence[str], siege: "Callable[[Terms | None], Siege]", say: Say
) -> Iterator[dict[str, Any]]:
    for name in names:
        setting = SETTINGS[name]
        bare = siege(Terms(**_NO_LIMITS, most_change=setting.most_change))
        kept = siege(Terms(most_change=setting.most_change))
        row = {
            "setting": name,
            "no_contract": len(bare.read(setting)),
            "offers": bare.device.asked,
            "defaults": len(kept.read(setting)),
            "declined": kept.device.refused,
        }
        say(", ".join(f"{what} {value}" for what, value in row.items()))
        yield row


_NO_LIMITS = {
    name: 0
    for name in Terms.__struct_fields__
    if name.startswith(("least_", "most_")) and name != "most_change"
}


class Siege:
    """One device under attack."""

    def __init__(
        self, machine: Machine, artifact: Path, data: Path, others: Path, terms: Terms | None
    ) -> None:
        self.device = Device(machine, artifact, data, terms)
        self._machine = machine
        self._lines = lines_of(self.device.dataset)
        self._others = load_dataset(others, self.device.artifact.manifest, artifact, seq_len=32)
        self._attacker = Attacker(artifact, [*self._lines, *lines_of(self._others)])

    def read(self, setting: Setting) -> set[Line]:
        """The lines that are read."""
        return {*self._fished(setting)} if setting.share else {*self._spanned(setting)}

    def _spanned(self, setting: Setting) -> Iterator[Line]:
        """Batch by batch: the same samples again and again, each time with other bait."""
        for seed, rows in seeds_for(self.device.dataset, setting.batch, setting.steps, last=setting.erased):
            work = _work(setting, seed)
            baits = [self._attacker.bait() for _ in range(setting.offers)]
            made = [self._rows(work, bait, setting.noise) for bait in baits]
            found = [rows for rows in made if rows is not None]
            if found:
                yield from self._attacker.read(np.concatenate(found), [self._lines[i] for i in rows])

    def _fished(self, setting: Setting) -> Iterator[Line]:
        """All lines in one offer, of which few answer, each time others."""
        label = self.device.artifact.manifest.labels.index(NOBODYS)
        work = LocalWork(batch_size=setting.batch, seq_len=32, optimizer=OptimizerSpec(name="sgd", lr=1e-3))
        for _ in range(setting.offers):
            bait = self._attacker.hook(label, partial(self._features, self._others), share=setting.share)
            rows = self._rows(work, bait, setting.noise)
            hooked = self._attacker.hooked(label, bait, self._features(self.device.dataset, bait))
            if rows is not None:
                yield from self._attacker.read(rows, [self._lines[i] for i in hooked])

    def _rows(self, work: LocalWork, bait: Arrays, noise: float) -> Doubles | None:
        values = self.device.answer(work, bait)
        if values is None:
            return None
        return self._attacker.rows(noisy(values, bait, noise) if noise else values, bait)

    def _features(self, dataset: Any, adapter: Arrays) -> Doubles:
        batch = dataset.rows(np.arange(dataset.num_samples))
        return np.asarray(self._machine.engine.features(batch, adapter), np.float64)


def _work(setting: Setting, seed: int) -> LocalWork:
    sgd = msgspec.structs.replace(SGD, weight_decay=1.0) if setting.erased else SGD
    if setting.steps > 1 and not setting.erased:
        sgd = msgspec.structs.replace(SGD, lr=1e-3)  # so that the model stays where it is
    return LocalWork(steps=setting.steps, batch_size=setting.batch, seq_len=32, seed=seed, optimizer=sgd)
