"""What a virtual device's memory allows, by the same law as ``fleetune device --memory-budget-mb``."""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import msgspec

from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.contracts.plans import LayerPlan, Mode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.data.samples import Dataset
from fleetune.device_runtime.engine.footprint import footprint, holds_whole_models
from fleetune.device_runtime.errors import TooLittleMemory
from fleetune.device_runtime.training.budget import MARGIN, Fit, fit
from fleetune.device_runtime.training.machine import widest
from fleetune.toolkit.simulation.calls import Call

_REMEMBERED = 4096


class MemoryModel:
    """Memory plans and expected peaks for one artifact; of one that holds whole models nothing is known, and all fits."""

    def __init__(self, artifact: Artifact) -> None:
        """Prepare."""
        self._artifact = artifact
        self._is_known = not holds_whole_models(artifact.manifest)
        self._peak_mb = lru_cache(_REMEMBERED)(partial(_peak_mb, artifact))
        self._fit = lru_cache(_REMEMBERED)(partial(_fit, artifact))

    def fit(
        self, work: LocalWork, data: Callable[[], Dataset], budget_mb: float
    ) -> tuple[LocalWork, MemoryPlan]:
        """Return how a device does ``work``: with ``policy.drop`` raised, if that is needed.

        Args:
            work: what it is asked.
            data: gives its samples, where they matter.
            budget_mb: its memory.

        Raises:
            TooLittleMemory: nothing fits; says the least that would.
        """
        asked = MemoryPlan(micro_tokens=work.micro_tokens)
        if not self._is_known or self._most_mb(work.batch_size, work.seq_len, asked) <= budget_mb:
            return work, asked
        dataset = data()
        found = self._fit(
            work,
            num_tokens=widest(dataset, self._artifact),
            budget_mb=budget_mb,
            num_steps=dataset.num_steps(work),
        )
        if isinstance(found, str):
            raise TooLittleMemory(found)
        policy = msgspec.structs.replace(work.policy, drop=found.drop)
        return msgspec.structs.replace(work, policy=policy), found.memory

    def _most_mb(self, batch_size: int, seq_len: int, memory: MemoryPlan) -> float:
        """Expected peak of the deepest step that there is, rows of up to ``seq_len``, margin included, in 10^6 bytes."""
        everything = frozenset(range(self._artifact.manifest.num_layers))
        deepest = (Mode.TRAIN,) * len(everything)
        return MARGIN * max(
            self._peak_mb(deepest, batch_size, tokens, memory, everything)
            for tokens in memory.widths(max(1, seq_len))
        )

    def peak_mb(self, calls: Sequence[Call]) -> float:
        """Expected peak of a run in 10^6 bytes: that of its deepest step; 0 without one, or where it is not known."""
        steps = [call for call in calls if call.is_step]
        if not steps or not self._is_known:
            return 0.0
        manifest = self._artifact.manifest
        ways = {(call.plan, call.gates, call.cache_below): call for call in steps}.values()
        routes = [call.way(manifest) for call in ways]
        deepest, _ = max(
            zip(ways, routes, strict=True), key=lambda pair: (len(pair[1].layers), len(pair[1].back))
        )
        rows, widths = max(call.rows for call in steps), {call.tokens // call.rows for call in steps}
        read = frozenset(layer for route in routes for layer in route.layers)
        return max(
            self._peak_mb(deepest.layer_plan, rows, tokens, deepest.memory, read)
            for tokens in (widths if deepest.memory.micro_tokens else {max(widths)})
        )


def _fit(
    artifact: Artifact, work: LocalWork, *, num_tokens: int, budget_mb: float, num_steps: int
) -> Fit | str:
    """What fits, or why nothing does: to be remembered either way."""
    try:
        return fit(artifact, work, num_tokens=num_tokens, budget_mb=budget_mb, num_steps=num_steps)
    except TooLittleMemory as exc:
        return str(exc)


def _peak_mb(
    artifact: Artifact, plan: LayerPlan, rows: int, tokens: int, memory: MemoryPlan, read: frozenset[int]
) -> float:
    found = footprint(artifact, plan, batch_size=rows, seq_len=tokens, memory=memory, also_read=read)
    return found.peak / 1e6
