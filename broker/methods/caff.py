"""CAFF: each device trains as many of the uppermost layers as keep it in step with the others.

Source: Pfeiffer, Ahmed, Khalili and Henkel, arXiv 2411.07826: each device trains the largest number of layers that its
memory, upload and arithmetic allow, freezes the rest, and layers are averaged over those who trained them. That the trained
layers are the uppermost is how we read it: only so the lower ones keep no activations. Its first step, to choose among
pretrained models, is left out.

Ours: limits are not told but seen. The arithmetic that a device may spend is what it does in the time in which the middle one
of the devices heard so far trains all layers; work that a device declined for its memory bounds its depth from then on.
"""

from statistics import median
from typing import NamedTuple

from fleetune.broker.jobs.settings import Settings
from fleetune.broker.methods.choosing import Candidate, Choice, Configurator
from fleetune.broker.methods.depths import WAY_BACK, assigned, depth_of, is_time, num_layers_of, suffix, units
from fleetune.broker.tasks import Outcome

FIRST = 0.25
"""Share of the layers that a device trains of which nothing is known."""


class _Seen(NamedTuple):
    settings: Settings
    paces: dict[str, float]
    """Seconds of a device's newest work for each layer run forward."""
    bounds: dict[str, int]
    """Most layers that fit a device's memory, where it has declined more."""


def caff() -> Configurator:
    """Choose the deepest suffix in time and memory for each device; a quarter of the layers for one that is not known."""

    def choose(seen: _Seen, candidate: Candidate) -> Choice:
        num_layers = num_layers_of(seen.settings)
        depth, reason = _depth(seen, candidate.device_id, num_layers)
        work = assigned(seen.settings, candidate, policy=suffix(depth, num_layers))
        return Choice(work, f"{depth} of {num_layers} layers: {reason}")

    return Configurator(lambda settings: _Seen(settings, {}, {}), choose, _learned)


def _depth(seen: _Seen, device_id: str, num_layers: int) -> tuple[int, str]:
    bound = seen.bounds.get(device_id, num_layers)
    if device_id not in seen.paces:
        return min(max(1, round(FIRST * num_layers)), bound), "nothing known of its time"
    limit_s = median(seen.paces.values()) * units(num_layers, num_layers)
    affordable = int(min((limit_s / seen.paces[device_id] - num_layers) / WAY_BACK, num_layers))
    if bound < affordable:
        return bound, "what fits its memory"
    return max(1, affordable), f"what it does in {limit_s:.3g} s"


def _learned(seen: _Seen, outcome: Outcome) -> _Seen:
    num_layers = num_layers_of(seen.settings)
    depth, seconds = depth_of(outcome.work.policy, num_layers), outcome.stats.get("seconds", 0.0)
    if outcome.declined == "memory":
        return seen._replace(bounds={**seen.bounds, outcome.device_id: max(1, depth - 1)})
    if not is_time(seconds):
        return seen
    return seen._replace(paces={**seen.paces, outcome.device_id: seconds / units(depth, num_layers)})
