"""How far one update may move an adapter: its difference is scaled down to a norm that the owner allows."""

import math
from typing import NamedTuple

import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats
from fleetune.device_runtime.contracts.codecs.codec import Doubles, floats
from fleetune.device_runtime.contracts.gaussian import Source, bounded, change_of, gaussian


class Clipped(NamedTuple):
    """An update that keeps to its owner's limit."""

    values: Arrays
    norm: float
    """L2 norm of the whole difference before."""
    scale: float
    """What it was multiplied by: 1 where the limit does not bind, and then the values are the very same arrays."""


def clipped(values: Arrays, reference: Arrays, *, rms_max: float) -> Clipped:
    """Scale a difference down: reference + (values - reference) min(1, C / |values - reference|), C = rms_max sqrt(n).

    The norm is L2 over all n elements together, in float64. ``rms_max`` is then the largest root mean square of the elements'
    changes, a limit that means the same for small and large adapters; 0 for none.

    Args:
        values: what an update holds, float32 by tensor name.
        reference: what it starts from, the same names and shapes.
        rms_max: the owner's limit.

    Source: clipping by the global norm of an update as in DP-FedAvg (McMahan et al., arXiv 1710.06963, section 3); the limit's
    growth with sqrt(n) is ours.
    """
    norm = math.sqrt(sum(float(np.square(_change(v, reference[n])).sum()) for n, v in values.items()))
    limit = rms_max * math.sqrt(sum(value.size for value in values.values()))
    if not rms_max or not math.isfinite(norm) or norm <= limit:
        return Clipped(values, norm, 1.0)
    scale = limit / norm
    return Clipped(
        {n: _moved(reference[n], scale * _change(v, reference[n])) for n, v in values.items()}, norm, scale
    )


def hidden(kept: Clipped, reference: Arrays, *, norm_max: float, noise: float, source: Source) -> Clipped:
    """Scale a change down to the L2 norm that an aggregator asks for, and add normal noise to it.

    Where neither does anything the values are the very same arrays. Noise is in every tensor, also in those that training did
    not touch.

    Args:
        kept: what may leave, its names those of all tensors that may.
        reference: what it starts from.
        norm_max: of the whole change; 0 for any, and then there is no noise.
        noise: its standard deviation in ``norm_max``; 0 for none.
        source: of the noise.
    """
    if not norm_max:
        return kept
    found = bounded(change_of(kept.values, reference), norm_max)
    if found.scale == 1.0 and not noise:
        return kept
    change = dict(found.change)
    if noise:
        change = {n: c + noise * norm_max * gaussian(c.shape, source) for n, c in sorted(change.items())}
    values: Arrays = {n: _moved(reference[n], c) for n, c in change.items()}
    return Clipped(values, kept.norm or found.norm, kept.scale * found.scale)


def _change(value: Array, reference: Array) -> Doubles:
    return np.subtract(value, reference, dtype=np.float64)


def _moved(reference: Array, change: Doubles) -> Floats:
    return floats(np.add(reference, change, dtype=np.float64))
