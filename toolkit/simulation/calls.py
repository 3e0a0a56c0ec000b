"""What a run asked of its engine, call by call: from it follow its virtual time, and what the device's hidden cache holds."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from hashlib import sha256
from typing import Any, NamedTuple

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Indices
from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode, Route, learnable, route
from fleetune.device_runtime.engine.batches import StepResult, num_rows, num_tokens
from fleetune.device_runtime.engine.engine import Engine
from fleetune.device_runtime.engine.gates import Gates, lowest_shut, open_layers
from fleetune.device_runtime.engine.hidden_cache import HiddenRows, OpenRows
from fleetune.device_runtime.engine.lanes import Rows

_FORWARDS = ("predict", "predict_at")
"""Further calls of an engine that go forward once."""
_HALF_BYTES = 2


class Call(msgspec.Struct, frozen=True, array_like=True):
    """One call of an engine."""

    rows: int
    tokens: int
    """Of all rows together, padding included."""
    plan: tuple[int, ...] = ()
    """One mode per layer of a step; empty for a forward."""
    share: float = 1.0
    """Of a forward: the share of the layers that runs."""
    cache_below: int = -1
    gates: bytes = b""
    """Bits of (layers, rows): which rows run through which layer; empty for all."""
    examples: bytes = b""
    """Index of each row's example, int32, where hidden streams are kept."""
    below: str = ""
    """Digest of what makes the hidden stream there."""
    memory: MemoryPlan = SAVE_ALL
    """How a step was held; of a forward, its bound in tokens."""

    @property
    def is_step(self) -> bool:
        """Whether it is a training step."""
        return bool(self.plan)

    @property
    def layer_plan(self) -> LayerPlan:
        """Of a step."""
        return tuple(Mode(mode) for mode in self.plan)

    def open_rows(self) -> Gates | None:
        """Gates of a step, bool (layers, rows); None if it has none."""
        if not self.gates:
            return None
        bits = np.unpackbits(np.frombuffer(self.gates, np.uint8), count=len(self.plan) * self.rows)
        return bits.astype(np.bool_).reshape(len(self.plan), self.rows)

    def way(self, manifest: Manifest) -> Route:
        """Which layers a step runs there and back."""
        plan, gates, below = learnable(self.layer_plan, manifest.learning), self.open_rows(), self.cache_below
        if gates is not None:
            plan = open_layers(plan, gates)
            below = min(route(plan, cache_below=below).boundary, lowest_shut(gates))
        return route(plan, cache_below=below)


class StepKind(NamedTuple):
    """What a step's time depends on beside its tokens: how many layers there are of each sort."""

    below: int
    """Run below the boundary, where hidden streams may be kept."""
    between: int
    """Run from there to the lowest trained layer."""
    trained: int
    passed: int
    """Above the lowest trained layer: frozen or bare, on the way back."""
    around: int
    """Above it: the gradient goes around them."""
    bare: int
    """Of all that run, without their LoRA."""
    saved_by_gates: float
    """Layers that gates save, rounded to halves: of two layers that half of the rows pass by, one."""

    @classmethod
    def of(cls, call: Call, manifest: Manifest) -> "StepKind":
        """Count the layers of a step."""
        way, gates = call.way(manifest), call.open_rows()
        return cls(
            len(way.below),
            sum(way.boundary <= i < way.lowest for i in way.layers),
            len(way.trained),
            len(way.back) - len(way.trained),
            sum(i >= way.lowest for i in way.around),
            len(way.bare),
            0.0 if gates is None else round(2 * float((~gates[list(way.layers)]).mean(1).sum())) / 2,
        )

    @property
    def key(self) -> str:
        """Its name in a file of timings."""
        counts = (f"{name.replace('_', ' ')} {count:g}" for name, count in self._asdict().items() if count)
        return ", ".join(counts) or "head alone"


class WatchedEngine:
    """An engine that notes its calls."""

    def __init__(self, engine: Engine) -> None:
        """Wrap it."""
        self.calls: list[Call] = []
        self._engine = engine

    @property
    def artifact(self) -> Artifact:
        """As of the engine."""
        return self._engine.artifact

    def rows(self, *args: Any, **options: Any) -> Rows:
        """As of the engine."""
        return self._engine.rows(*args, **options)

    def step(
        self,
        batch: Arrays,
        plan: LayerPlan,
        adapter: Arrays,
        *,
        hidden: OpenRows | None = None,
        gates: Gates | None = None,
        cache_below: int = -1,
        **options: Any,
    ) -> StepResult:
        """As of the engine."""
        size = self._size(batch)
        call = Call(
            *size,
            plan=tuple(map(int, plan)),
            cache_below=cache_below,
            gates=b"" if gates is None else np.packbits(gates).tobytes(),
            memory=_held(options.get("rows"), size[0]),
        )
        self.calls.append(call)
        opened = partial(self._open, call, hidden) if hidden else None
        return self._engine.step(
            batch, plan, adapter, hidden=opened, gates=gates, cache_below=cache_below, **options
        )

    def evaluate(self, batch: Arrays, adapter: Arrays, *, rows: Rows | None = None) -> tuple[float, Array]:
        """As of the engine."""
        self.calls.append(Call(*self._size(batch), memory=_bound(rows)))
        return self._engine.evaluate(batch, adapter, rows=rows)

    def features(
        self,
        batch: Arrays,
        adapter: Arrays,
        *,
        rows: Rows | None = None,
        hidden: OpenRows | None = None,
        cache_below: int = 0,
    ) -> Array:
        """As of the engine."""
        call = Call(*self._size(batch), cache_below=cache_below, memory=_bound(rows))
        self.calls.append(call)
        opened = partial(self._open, call, hidden) if hidden else None
        return self._engine.features(batch, adapter, rows=rows, hidden=opened, cache_below=cache_below)

    def close(self) -> None:
        """As of the engine."""
        self._engine.close()

    def __getattr__(self, name: str) -> Any:
        """What else the engine has."""
        found = getattr(self._engine, name)
        return partial(self._forward, found) if name in _FORWARDS else found

    def _forward(self, run: Callable[..., Array], batch: Arrays, *args: Any, **options: Any) -> Array:
        plan = options.get("plan")
        share = 1.0 if plan is None else sum(mode is not Mode.DROP for mode in plan) / len(plan)
        self.calls.append(Call(*self._size(batch), share=share, memory=_bound(options.get("rows"))))
        return run(batch, *args, **options)

    def _open(self, call: Call, hidden: OpenRows, below: Mapping[str, Array]) -> HiddenRows:
        """Note which examples are asked for; ``hidden`` is a partial of :meth:`HiddenCache.of` with them."""
        (examples,) = getattr(hidden, "args", (np.arange(call.rows),))
        noted = msgspec.structs.replace(
            call, examples=np.asarray(examples, np.int32).tobytes(), below=_digest(below)
        )
        self.calls[-1] = noted
        return hidden(below)

    def _size(self, batch: Arrays) -> tuple[int, int]:
        inputs = [row for row in self.artifact.manifest.features if row.name in batch]
        rows = num_rows(batch, inputs)
        return rows, rows * (num_tokens(batch, inputs) or 1)


class CacheModel:
    """Which examples a device's hidden cache holds: what a ``HiddenCache`` of its own would, through all of its runs."""

    def __init__(self, *, limit_bytes: int, width: int) -> None:
        """Begin empty; ``width`` of the hidden stream."""
        self._limit, self._row_bytes = limit_bytes, _HALF_BYTES * width
        self._below = ""
        self._held: set[int] = set()
        self._end = 0

    def clear(self) -> None:
        """Forget all: the device was started again."""
        self._below, self._end = "", 0
        self._held.clear()

    def hit_shares(self, calls: Iterable[Call], lengths: Indices) -> Iterator[float]:
        """Share of each call's rows that are found; ``lengths`` of the device's examples in tokens."""
        return (self._take(call, lengths) if call.below else 0.0 for call in calls)

    def _take(self, call: Call, lengths: Indices) -> float:
        if call.below != self._below:
            self.clear()
            self._below = call.below
        examples = np.frombuffer(call.examples, np.int32).tolist()
        missing = [example for example in examples if example not in self._held]
        for example in missing:
            size = self._row_bytes * min(call.tokens // call.rows, int(lengths[example]))
            if self._end + size <= self._limit:
                self._held.add(example)
                self._end += size
        return 1 - len(missing) / len(examples)


def _held(rows: Rows | None, count: int) -> MemoryPlan:
    """The memory plan of a step, as for ``count`` rows: a micro-batch that holds all of them is none."""
    memory = rows.memory if rows else SAVE_ALL
    return memory._replace(micro_batch=0) if memory.micro_batch >= count else memory


def _bound(rows: Rows | None) -> MemoryPlan:
    return MemoryPlan(micro_tokens=rows.memory.micro_tokens) if rows else SAVE_ALL


def _digest(below: Mapping[str, Array]) -> str:
    found = sha256()
    for name, value in below.items():
        found.update(name.encode())
        found.update(np.ascontiguousarray(value).data)
    return found.hexdigest()[:16]
