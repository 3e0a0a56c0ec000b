"""How long a step takes on this machine on one thread: measured once for each kind of step, kept in a file, then looked up.

A machine is quicker at one time than at another, by what else it does. So a step is timed in turns with a forward of the same
batch, and what is kept is how many times longer it took, in seconds of a forward as that was measured: times of one artifact
compare, whenever they were taken.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Arrays, Indices, write_atomically
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.hidden_cache import HiddenCache, OpenRows
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import doing, locked, read_json
from fleetune.toolkit.simulation.calls import Call, StepKind
from fleetune.toolkit.simulation.profiles import measure_gflops

_TIMED, _WARM = 7, 1
_CACHE_BYTES = 2**30
FORWARD = "forward"
"""Key of a forward at full depth, as an evaluation runs it."""
BESIDE = "a round beside its steps"
"""Key of what :mod:`fleetune.toolkit.simulation.overhead` measures; its sizes are steps."""


class Point(NamedTuple):
    """What was measured."""

    size: int
    """In tokens; of a round beside its steps, in steps."""
    seconds: float


class Timings(msgspec.Struct, kw_only=True):
    """The file: by artifact, then by kind of step."""

    machine: str
    gflops: float = 0.0
    """Of matrix products on one thread."""
    artifacts: dict[str, dict[str, list[Point]]] = {}


class Sample(NamedTuple):
    """What is to be timed."""

    call: Call
    cached: bool = False
    """Whether all of its rows are found in the hidden cache."""
    forward_s: Callable[[int], float] | None = None
    """Seconds of a forward by its tokens, as far as they were measured."""


Measure = Callable[[Sample], list[Point]]
MeasureRounds = Callable[[], list[Point]]


class Costs:
    """Seconds of steps. What is in the file is never measured again, so that a simulation stays what it was."""

    def __init__(
        self,
        path: Path,
        artifact: Artifact,
        measure: Measure,
        *,
        rounds: MeasureRounds | None = None,
    ) -> None:
        """Prepare.

        Args:
            path: the file; made with the first measurement.
            artifact: of which they are.
            measure: of what is not in the file, (tokens, seconds) at two sizes.
            rounds: the same of a round beside its steps, (steps, seconds); None where that takes no time.

        Raises:
            StateError: the file is damaged.
        """
        self._path, self._artifact, self._measure, self._rounds = path, artifact, measure, rounds
        self._lines: dict[str, Callable[[int], float]] = {}
        self._read()

    def call_s(self, call: Call, *, hit_share: float = 0.0) -> float:
        """Seconds of a call of whose rows ``hit_share`` is found in the hidden cache."""
        if not call.is_step:
            return call.share * self._held_forward(call)(call.tokens)
        key = StepKind.of(call, self._artifact.manifest).key + held(call.memory)
        plain = self._step(key, call, cached=False)(call.tokens)
        if not hit_share:
            return plain
        cached = self._step(f"{key}; cached", call, cached=True)(call.tokens)
        return (1 - hit_share) * plain + hit_share * cached

    def beside_s(self, num_steps: int) -> float:
        """Seconds of what a device does in a round of so many steps beside the engine's work."""
        rounds = self._rounds
        return 0.0 if rounds is None else self._line(BESIDE, rounds)(num_steps)

    def least_s(self, work: LocalWork, num_samples: int) -> float:
        """Seconds that a run of ``work`` takes at least: its steps, by the head alone, of few and short rows."""
        num_layers = self._artifact.manifest.num_layers
        rows = max(1, min(work.batch_size, num_samples // 2))
        steps = work.steps or work.epochs * max(1, num_samples // 2 // work.batch_size)
        call = Call(rows, rows, plan=(int(Mode.DROP),) * num_layers)
        return steps * self.call_s(call)

    def gflops(self, measure: Callable[[], float] = measure_gflops) -> float:
        """GFLOP/s of matrix products on one thread of this machine."""
        if not self._file().gflops:
            with self._writing() as timings:
                timings.gflops = timings.gflops or measure()
        return self._file().gflops

    def _forward(self, call: Call) -> Callable[[int], float]:
        return self._line(FORWARD, lambda: self._measure(Sample(Call(call.rows, call.tokens))))

    def _held_forward(self, call: Call) -> Callable[[int], float]:
        ending = held(call.memory)
        return self._step(FORWARD + ending, call, cached=False) if ending else self._forward(call)

    def _step(self, key: str, call: Call, *, cached: bool) -> Callable[[int], float]:
        return self._line(key, lambda: self._measure(Sample(call, cached, self._forward(call))))

    def _line(self, key: str, measured: Callable[[], list[Point]]) -> Callable[[int], float]:
        if key not in self._lines:
            self._read()
        if key not in self._lines:
            points = measured()
            with self._writing() as timings:
                timings.artifacts.setdefault(self._artifact.digest, {}).setdefault(key, points)
            self._read()
        return self._lines[key]

    def _read(self) -> None:
        found = self._file().artifacts.get(self._artifact.digest, {})
        self._lines = {key: line_through(points, f"{self._path}: {key}") for key, points in found.items()}

    def _file(self) -> Timings:
        return read_json(self._path, Timings) or Timings(machine=machine_name())

    @contextmanager
    def _writing(self) -> Iterator[Timings]:
        """The file as it is, to be changed; other simulations wait."""
        with doing("written", self._path):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with locked(self._path.with_suffix(".lock"), wait=True):
                timings = self._file()
                yield timings
                write_atomically(self._path, msgspec.json.format(msgspec.json.encode(timings), indent=1))


def line_through(points: list[Point], where: str) -> Callable[[int], float]:
    """Seconds by size, a line through two points that neither falls nor begins below zero.

    Raises:
        StateError: not two points of finite times above zero.
    """
    if len(points) != 2 or not all(p.size > 0 and 0 < p.seconds < 1e9 for p in points):
        raise StateError(f"{where}: expected two times above 0 s; move the file away to measure again")
    (t1, s1), (t2, s2) = sorted(points)
    slope = max(0.0, (s2 - s1) / (t2 - t1)) if t2 > t1 else s2 / t2
    start = s1 - slope * t1
    if start < 0:
        start, slope = 0.0, s2 / t2
    return lambda size: start + slope * size


def held(memory: MemoryPlan) -> str:
    """How a memory plan ends the name of a kind of step; empty where all is kept."""
    rows = f", {memory.micro_batch} rows at a time" if memory.micro_batch else ""
    rows += f", {memory.micro_tokens} tokens at a time" if memory.micro_tokens else ""
    saved = "" if memory.saved_layers is None else f", saved {memory.saved_layers}"
    return rows + saved + (", streamed" if memory.streamed else "")


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
        with ExitStack() as stack:
            tokens = len(rows) * self._dataset.width_of(rows)
            forward: Callable[[], object] = partial(engine.evaluate, batch, self._adapter)
            if sample.forward_s is None:
                return Point(tokens, _typical([_seconds(forward) for _ in range(_WARM + 2 * _TIMED)]))
            hidden = self._filled(stack, len(rows)) if sample.cached else None
            step = self._stepping(engine, sample.call, batch, hidden)
            pairs = [(_seconds(step), _seconds(forward)) for _ in range(_WARM + _TIMED)]
        return Point(tokens, sample.forward_s(tokens) * _typical([mine / other for mine, other in pairs]))

    def _stepping(
        self, engine: Engine, call: Call, batch: Arrays, hidden: OpenRows | None
    ) -> Callable[[], object]:
        gates, count = call.open_rows(), len(next(iter(batch.values())))
        rows = engine.rows(count, 0, call.memory)
        if not call.is_step:
            return partial(engine.evaluate, batch, self._adapter, rows=rows)
        if gates is not None:
            gates = gates[:, np.arange(count) % gates.shape[1]]
        return partial(
            engine.step,
            batch,
            call.layer_plan,
            self._adapter,
            rows=rows,
            hidden=hidden,
            gates=gates,
            cache_below=call.cache_below,
        )

    def _filled(self, stack: ExitStack, count: int) -> OpenRows:
        """A cache that the first step, which is not timed, fills."""
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="fleetune-timing-"))
        cache = stack.enter_context(HiddenCache(Path(folder), lengths=None, limit_bytes=_CACHE_BYTES))
        return partial(cache.of, np.arange(count))


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
    return max(time.process_time() - start, 1e-9)


def _typical(values: list[float]) -> float:
    """Median of what was measured once it is warm."""
    return statistics.median(values[_WARM:])
