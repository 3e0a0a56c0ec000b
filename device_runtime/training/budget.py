"""Fits a run into a memory budget: of all memory plans whose expected peak is within it, the one that costs least time."""

import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import msgspec

from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, Route, route
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Draws
from fleetune.device_runtime.engine.footprint import BARE_BYTES, largest_footprint
from fleetune.device_runtime.errors import TooLittleMemory
from fleetune.device_runtime.methods.policies import make_policy
from fleetune.device_runtime.methods.protection import EFFECTS

_DRAWS = 256
"""So many plans are made to find a policy's deepest, and the layers that it ever runs."""
_SPREAD = 0.6180339887498949
"""Steps are picked by multiples of the golden ratio: their places in a run, or in a period, are spread evenly whatever it is."""
MARGIN = 1.125
"""Measured peaks were at most 10 % above the estimates (`fleetune bench budget`: BERT, one row at a time)."""
_SLOW_TOKENS = 40
"""Measured: rows of so many tokens in all take twice the time per token; of 256, a sixth more."""
_STREAMING_TOKENS = 20
"""Measured: streaming costs as much time as so many tokens more in each micro-batch."""
_SETTLED_MB = 8.0
"""What the process holds is rounded up to this, so that a run started again fits the same way."""


class Fit(NamedTuple):
    """What was picked: how a step is held, and the share of layers that the policy drops (raised only if nothing else fits)."""

    memory: MemoryPlan
    drop: float
    active_layers: int
    """Of the deepest layer plan."""
    expected_mb: float
    """10^6 bytes, margin included."""

    def __str__(self) -> str:
        """One line for a person."""
        tokens = f" of at most {self.memory.micro_tokens} tokens" if self.memory.micro_tokens else ""
        rows = f"{self.memory.micro_batch} rows{tokens} at a time"
        kept = self.memory.saved_layers
        saved = (
            "all activations kept"
            if kept is None
            else f"activations of {kept} layers kept, the rest recomputed"
        )
        weights = "weights streamed" if self.memory.streamed else "weights resident"
        depth = f"at most {self.active_layers} layers active"
        return f"{rows}, {saved}, {weights}, {depth}: {self.expected_mb:.0f} MB expected"


def fit(
    artifact: Artifact,
    work: LocalWork,
    *,
    num_tokens: int,
    budget_mb: float,
    resident_mb: float = 0.0,
    num_steps: int = 0,
    count_lanes: Callable[[MemoryPlan], int] = lambda memory: 1,
) -> Fit:
    """The quickest way to do ``work`` within ``budget_mb`` (10^6 bytes).

    Layers are dropped beyond what the policy asks for only if it is ``exact-k`` and nothing else fits.

    Args:
        artifact: what is trained.
        work: policy, batch size, its bound in tokens, and seed.
        num_tokens: tokens of each row of the widest batch, padding included.
        budget_mb: largest resident memory that the process may reach.
        resident_mb: what the process holds before it opens a graph, if that is more than a bare one does.
        num_steps: steps of this run; 0 where that is not known.
        count_lanes: on how many lanes a batch runs that is held so.

    Raises:
        TooLittleMemory: nothing fits; says the least that would.
    """
    extra_mb = _extra_mb(resident_mb)
    least_mb = float("inf")
    for drop in _drops(work, artifact.manifest.num_layers):
        plan, way, read = _deepest(work, artifact.manifest.num_layers, drop, num_steps)
        choices = _choices(way, work)
        for memory in sorted(choices, key=lambda m: _time(m, way, work.batch_size, num_tokens)):
            found = largest_footprint(
                artifact,
                plan,
                batch_size=work.batch_size,
                seq_len=num_tokens,
                memory=memory,
                lanes=count_lanes(memory),
                also_read=read,
            )
            expected_mb = MARGIN * (found.peak / 1e6 + extra_mb)
            least_mb = min(least_mb, expected_mb)
            if expected_mb <= budget_mb:
                return Fit(memory, drop, len(way.layers), expected_mb)
    raise TooLittleMemory(
        f"memory budget of {budget_mb:g} MB: the least that would do is {math.ceil(least_mb)} MB (one row of {num_tokens} "
        f"tokens at a time, recomputed, weights streamed); shorten the text{_hint(work)}"
    )


def expected_mb(
    artifact: Artifact,
    work: LocalWork,
    *,
    num_tokens: int,
    memory: MemoryPlan,
    resident_mb: float = 0.0,
    lanes: int = 1,
    num_steps: int = 0,
) -> float:
    """Expected peak of the deepest step of ``work`` (10^6 bytes, margin included); arguments as of :func:`fit`.

    Raises:
        ConfigError: the artifact holds whole models, whose memory is not known.
    """
    plan, _, read = _deepest(work, artifact.manifest.num_layers, work.policy.drop, num_steps)
    found = largest_footprint(
        artifact,
        plan,
        batch_size=work.batch_size,
        seq_len=num_tokens,
        memory=memory,
        lanes=lanes,
        also_read=read,
    )
    return MARGIN * (found.peak / 1e6 + _extra_mb(resident_mb))


def resident_mb() -> float:
    """What this process holds in memory now, in 10^6 bytes; 0 where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _drops(work: LocalWork, num_layers: int) -> list[float]:
    """The policy's own share of dropped layers, then higher ones if it is a hard budget of layers anyway."""
    least = max(1, work.policy.protected)
    more = [i / num_layers for i in range(1, num_layers - least + 1)] if _is_budget(work) else []
    return [work.policy.drop, *(drop for drop in more if drop > work.policy.drop)]


def _choices(way: Route, work: LocalWork) -> Iterator[MemoryPlan]:
    size = work.batch_size
    rows = sorted({max(1, size >> n) for n in range(size.bit_length())}, reverse=True)
    for micro_batch in rows:
        for saved in (None, *range(len(way.back) - 1, -1, -1)):
            for streamed in (False, True):
                yield MemoryPlan(micro_batch, saved, streamed, work.micro_tokens)


def _time(memory: MemoryPlan, way: Route, batch_size: int, num_tokens: int) -> float:
    """Expected time of a step, in forwards through one layer at full speed; measured on BERT-base, good for an order."""
    back = len(way.back)
    rerun = 0 if memory.saved_layers is None else max(0, back - memory.saved_layers)
    tokens = num_tokens * memory.together(batch_size, num_tokens)
    slowed = 1 + (_SLOW_TOKENS + _STREAMING_TOKENS * memory.streamed) / tokens
    return (len(way.layers) + back + rerun) * slowed


def _hint(work: LocalWork) -> str:
    if _is_budget(work):
        return ""
    gates = " with gates for batches" if work.policy.gates == "row" else ""
    return f", or use policy exact-k{gates}, which may drop layers to fit"


def _extra_mb(resident_mb: float) -> float:
    """What the process holds beyond a bare one, rounded up."""
    return max(0.0, -(-resident_mb // _SETTLED_MB) * _SETTLED_MB - BARE_BYTES / 1e6)


def _is_budget(work: LocalWork) -> bool:
    """Whether more layers may be dropped than asked for."""
    return work.policy.name == "exact-k" and work.policy.gates == "batch"


def _deepest(
    work: LocalWork, num_layers: int, drop: float, num_steps: int
) -> tuple[LayerPlan, Route, set[int]]:
    """The deepest plan of a policy, its way, and every layer that any plan runs."""
    plans = _plans(work, num_layers, drop, num_steps or _DRAWS)
    plan, way = max(plans, key=lambda pair: (len(pair[1].layers), len(pair[1].back)))
    return plan, way, {layer for _, way in plans for layer in way.layers}


def _plans(work: LocalWork, num_layers: int, drop: float, num_steps: int) -> list[tuple[LayerPlan, Route]]:
    """Plans of this run: all of a short one, of a long one the first, the last, and some in between.

    Where effects decide which layers are protected and none are measured yet, the lowest are: the way back is longest so.
    """
    policy = make_policy(msgspec.structs.replace(work.policy, drop=drop), num_layers)
    before, state = work.rounds_before * num_steps, {EFFECTS: [-float(i) for i in range(num_layers)]}
    plans = [policy(before + i, Draws(work.seed, "plans", i), state) for i in _some_steps(num_steps)]
    return [(plan, route(plan)) for plan in dict.fromkeys(plans)]


def _some_steps(num_steps: int) -> list[int]:
    if num_steps <= _DRAWS:
        return list(range(num_steps))
    return sorted({num_steps - 1, *(int(i * _SPREAD % 1.0 * num_steps) for i in range(_DRAWS))})
