"""How long a step takes on this machine on one thread: measured once for each kind of step, kept in a file, then looked up."""

import fcntl
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Arrays, Indices, write_atomically
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.plans import LayerPlan
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import doing, read_json
from fleetune.toolkit.simulation.profiles import measure_gflops
from fleetune.toolkit.simulation.schedule import Step, StepKind

_TIMED, _WARM = 5, 1
_CACHE_BYTES = 2**30
FORWARD = "forward"
"""Key of a forward at full depth, as an evaluation runs it."""


class Point(NamedTuple):
    """What was measured."""

    tokens: int
    seconds: float


class Timings(msgspec.Struct, kw_only=True):
    """The file: by artifact, then by kind of step."""

    machine: str
    gflops: float = 0.0
    """Of matrix products on one thread."""
    artifacts: dict[str, dict[str, list[Point]]] = {}


class Sample(NamedTuple):
    """What is to be timed: ``step`` None for a forward."""

    step: Step | None
    cached: bool
    cache_below: int


Measure = Callable[[Sample], list[Point]]


class Costs:
    """Seconds of steps. What is in the file is never measured again, so that a simulation stays what it was."""

    def __init__(self, path: Path, artifact: str, measure: Measure) -> None:
        """Prepare.

        Args:
            path: the file; made with the first measurement.
            artifact: digest of the manifest.
            measure: of what is not in the file, (tokens, seconds) at two sizes.

        Raises:
            StateError: the file is damaged.
        """
        self._path, self._artifact, self._measure = path, artifact, measure
        self._lines: dict[str, Callable[[int], float]] = {}
        self._read()

    def step_s(self, step: Step, *, hit_share: float, cache_below: int) -> float:
        """Seconds of a step of whose rows ``hit_share`` is found in the hidden cache."""
        plain = self._line(key_of(step.kind), Sample(step, False, cache_below))(step.tokens)
        if not hit_share:
            return plain
        cached = self._line(key_of(step.kind, cached=True), Sample(step, True, cache_below))(step.tokens)
        return (1 - hit_share) * plain + hit_share * cached

    def forward_s(self, tokens: int) -> float:
        """Seconds of a forward at full depth."""
        return self._line(FORWARD, Sample(None, False, -1))(tokens)

    def gflops(self, measure: Callable[[], float] = measure_gflops) -> float:
        """GFLOP/s of matrix products on one thread of this machine."""
        if not self._file().gflops:
            with self._writing() as timings:
                timings.gflops = timings.gflops or measure()
        return self._file().gflops

    def _line(self, key: str, sample: Sample) -> Callable[[int], float]:
        if key not in self._lines:
            self._read()
        if key not in self._lines:
            points = self._measure(sample)
            with self._writing() as timings:
                timings.artifacts.setdefault(self._artifact, {}).setdefault(key, points)
            self._read()
        return self._lines[key]

    def _read(self) -> None:
        found = self._file().artifacts.get(self._artifact, {})
        self._lines = {key: line_through(points, f"{self._path}: {key}") for key, points in found.items()}

    def _file(self) -> Timings:
        return read_json(self._path, Timings) or Timings(machine=machine_name())

    @contextmanager
    def _writing(self) -> Iterator[Timings]:
        """The file as it is, to be changed; other simulations wait."""
        with doing("written", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.with_suffix(".lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                timings = self._file()
                yield timings
                write_atomically(self._path, msgspec.json.format(msgspec.json.encode(timings), indent=1))


def key_of(kind: StepKind, *, cached: bool = False) -> str:
    """Name a kind of step in the file."""
    counts = ", ".join(f"{name} {count}" for name, count in kind._asdict().items() if count)
    return f"{counts or 'head alone'}{'; cached' if cached else ''}"


def line_through(points: list[Point], where: str) -> Callable[[int], float]:
    """Seconds by tokens, a line through two points that neither falls nor begins below zero.

    Raises:
        StateError: not two points of finite times above zero.
    """
    if len(points) != 2 or not all(p.tokens > 0 and 0 < p.seconds < 1e9 for p in points):
        raise StateError(f"{where}: expected two times above 0 s; move the file away to measure again")
    (t1, s1), (t2, s2) = sorted(points)
    slope = max(0.0, (s2 - s1) / (t2 - t1)) if t2 > t1 else s2 / t2
    start = s1 - slope * t1
    if start < 0:
        start, slope = 0.0, s2 / t2
    return lambda tokens: start + slope * tokens


def machine_name() -> str:
    """What this machine's processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "unknown"


class Stopwatch:
    """Measures steps with the real engine on one thread: its processor time, which other processes disturb least."""

    def __init__(
        self, artifact: Artifact, dataset: Dataset, *, batch_size: int, settle: Callable[[], object]
    ) -> None:
        """Prepare; ``settle`` is called before a measurement."""
        self._artifact, self._dataset, self._settle = artifact, dataset, settle
        self._sizes = _two_sizes(dataset, batch_size)
        self._adapter = artifact.adapter()
        self._engine: Engine | None = None

    def __call__(self, sample: Sample) -> list[Point]:
        """Time a step, or a forward, on a real batch of either size."""
        self._settle()
        if self._engine is None:
            self._engine = open_engine(self._artifact, threads=1)
        return [self._time(self._engine, sample, rows) for rows in self._sizes]

    def close(self) -> None:
        """Let go of the engine."""
        if self._engine:
            self._engine.close()

    def _time(self, engine: Engine, sample: Sample, rows: Indices) -> Point:
        batch = self._dataset.rows(rows)
        tokens = len(rows) * self._dataset.width_of(rows)
        with tempfile.TemporaryDirectory(prefix="fleetune-timing-") as folder:
            if sample.step is None:
                run: Callable[[], object] = partial(engine.evaluate, batch, self._adapter)
            else:
                run = self._stepping(engine, sample, sample.step.plan, batch, Path(folder))
            times = [_seconds(run) for _ in range(_WARM + _TIMED)][_WARM:]
        return Point(tokens, max(statistics.median(times), 1e-9))

    def _stepping(
        self, engine: Engine, sample: Sample, plan: LayerPlan, batch: Arrays, folder: Path
    ) -> Callable[[], object]:
        hidden = None
        if sample.cached:
            cache = HiddenCache(folder, lengths=None, limit_bytes=_CACHE_BYTES)
            examples = np.arange(len(next(iter(batch.values()))))
            hidden = partial(cache.of, examples)
        return partial(engine.step, batch, plan, self._adapter, hidden=hidden, cache_below=sample.cache_below)


def _two_sizes(dataset: Dataset, batch_size: int) -> list[Indices]:
    """Two batches between which most lie: a short one and a long one, or where rows have one shape, half of it and all."""
    batches = [
        b for b in dataset.ordered_batches(batch_size) if len(b) == min(batch_size, dataset.num_samples)
    ]
    short, long = batches[len(batches) // 10], batches[len(batches) - 1 - len(batches) // 10]
    if dataset.width_of(short) == dataset.width_of(long):
        short = long[: max(1, len(long) // 2)]
    return [short, long]


def _seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start
