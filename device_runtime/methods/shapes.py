"""How often each layer falls: a depth shape, and the rates that have it and a given mean.

Rates are made by + - * / and comparisons in a written order: other languages get the same bits (``docs/draws.md``).
DropPEFT's text (arXiv 2503.10217) names shapes; how one follows from its mean, and the clamp at 0.95, are ours.
"""

from collections.abc import Callable, Sequence

import numpy as np

from fleetune.device_runtime.draws import Doubles
from fleetune.device_runtime.tables import Table

RATE_MAX = 0.95
"""No layer is dropped more often than this."""
_BISECTIONS = 80
_EXP_TERMS, _EXP_SQUARINGS = 12, 4


def num_kept(num_layers: int, *, drop: float) -> int:
    """Count the layers that ``exact-k`` keeps and those that drop none train: ``round(num_layers * (1 - drop))``, at least 1."""
    return max(1, round(num_layers * (1 - drop)))


def drop_rates(num_layers: int, *, drop: float, shape: str, protected: Sequence[int] = ()) -> Doubles:
    """Rate of each layer: ``min(m * shape, 0.95)``, ``m`` such that the mean is ``drop`` (or all reach 0.95).

    Those ``protected`` have rate 0 and count in the mean.
    """
    weights = SHAPES[shape](num_layers)
    weights[list(protected)] = 0.0
    if not drop or not weights.any():
        return np.zeros(num_layers)
    low, high = 0.0, RATE_MAX / float(weights[weights > 0].min())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _mean(np.minimum(middle * weights, RATE_MAX)) < drop:
            low = middle
        else:
            high = middle
    return np.minimum(high * weights, RATE_MAX)


def _uniform(num_layers: int) -> Doubles:
    """No prior."""
    return np.ones(num_layers)


def _incremental(num_layers: int) -> Doubles:
    """Upper layers fall more often, as in stochastic depth."""
    return np.arange(1, num_layers + 1) / num_layers


def _decay(num_layers: int) -> Doubles:
    """Lower layers fall more often."""
    return np.arange(num_layers, 0, -1) / num_layers


def _normal(num_layers: int) -> Doubles:
    """Middle layers fall more often; both ends stay."""
    offset = (np.arange(num_layers) - (num_layers - 1) / 2) / (num_layers / 6)
    return _exp_of_minus(0.5 * (offset * offset))


def _exp_of_minus(x: Doubles) -> Doubles:
    """Compute e**-x for x in [0, 5] by + * / alone: a library's ``exp`` differs in its last bit from another's."""
    y, series = x / 2.0**_EXP_SQUARINGS, np.ones_like(x)
    for j in range(_EXP_TERMS, 0, -1):
        series = 1 + y * series / j
    for _ in range(_EXP_SQUARINGS):
        series = series * series
    return 1 / series


def _mean(x: Doubles) -> float:
    """Mean by one addition at a time from the left; ``np.mean`` adds in an order of its own."""
    return float(np.cumsum(x)[-1]) / len(x)


SHAPES: Table[Callable[[int], Doubles]] = Table(
    "depth shape", {"uniform": _uniform, "incremental": _incremental, "decay": _decay, "normal": _normal}
)
