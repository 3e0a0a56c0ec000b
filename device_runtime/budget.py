"""Keeps a run within a memory budget: saves activations if they fit, else recomputes them, else refuses."""

import os
from pathlib import Path

import numpy as np

from device_runtime.artifact import Artifact
from device_runtime.errors import ConfigError
from device_runtime.inspection import PROCESS_BYTES, estimate
from device_runtime.plans import LayerPlan
from device_runtime.policies import PolicyState, make_policy
from device_runtime.wire import LocalWork

_DRAWS = 256
"""Plans drawn to find a policy's deepest."""
MARGIN = 1.1
"""Measured peaks were at most 4 % above the estimates (`fleetune bench memory`); a tokenizer and data come on top."""


def must_recompute(
    artifact: Artifact, work: LocalWork, *, num_tokens: int, budget_mb: float, resident_mb: float = 0.0
) -> bool:
    """Whether ``work`` fits into ``budget_mb`` (10^6 bytes) only if activations are recomputed.

    Args:
        artifact: what is trained.
        work: policy, batch size and seed.
        num_tokens: tokens of each row of the widest batch, padding included.
        budget_mb: largest resident memory that the process may reach.
        resident_mb: what the process holds already, if that is more than a bare one would.

    Raises:
        ConfigError: it does not fit either way; says what is expected and what would help.
    """
    plan = _deepest_plan(work, artifact.manifest.num_layers)
    sizes = {"batch_size": work.batch_size, "seq_len": num_tokens}
    both = [estimate(artifact, plan, name=work.policy.name, recompute=r, **sizes) for r in (False, True)]
    extra_mb = max(0.0, resident_mb - PROCESS_BYTES / 1e6)
    saving_mb, recomputing_mb = (MARGIN * (expected.peak_mb + extra_mb) for expected in both)
    if min(saving_mb, recomputing_mb) > budget_mb:
        raise ConfigError(
            f"memory budget of {budget_mb:g} MB: {both[0].active_layers} layers at batch size {work.batch_size} and "
            f"{num_tokens} tokens may take {saving_mb:.0f} MB, {recomputing_mb:.0f} MB with recompute; "
            "use a smaller batch, shorter text, or policy exact-k with a higher drop"
        )
    return saving_mb > budget_mb


def resident_mb() -> float:
    """What this process holds in memory now, in 10^6 bytes; 0 where there is no /proc."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return 0.0
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def _deepest_plan(work: LocalWork, num_layers: int) -> LayerPlan:
    """The plan with most active layers among the first that the run will draw."""
    policy, state = make_policy(work.policy, num_layers), PolicyState()
    plans = (policy(step, np.random.default_rng([work.seed, step]), state) for step in range(_DRAWS))
    return max(plans, key=lambda plan: sum(mode > 0 for mode in plan))
