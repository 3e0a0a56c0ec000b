"""What the figure is called that a model is judged by beside its loss, by what the model is for.

Devices tell one score, from 0 to 1, as ``accuracy`` on the wire. People read what it is.
"""

import math
from typing import Any, TypeVar

import msgspec

from fleetune.device_runtime.contracts.manifest import Manifest

ACCURACY, EXACT_MATCH, R2, PERPLEXITY = SCORES = ("accuracy", "exact_match", "r2", "perplexity")
"""Share of right answers; share of rows with all labels right; R2, not below 0; and e to the loss of a token."""
LABELS = {ACCURACY: "accuracy", EXACT_MATCH: "exact match", R2: "R2", PERPLEXITY: "perplexity"}
"""How they are said."""
_LOSS_MAX = 709.0
"""Of a larger one the perplexity is no float64."""
T = TypeVar("T", bound=msgspec.Struct)


def score_of(manifest: Manifest) -> str:
    """Return which of SCORES an artifact's model is judged by."""
    if manifest.problem_type:
        return R2 if manifest.problem_type == "regression" else EXACT_MATCH
    return ACCURACY if manifest.labels else PERPLEXITY


def named(found: T, score: str) -> T:
    """Return a struct with fields ``loss`` and those of SCORES, with what was told as ``accuracy`` where it belongs.

    A language model keeps its accuracy, the share of right next tokens, beside its perplexity.
    """
    told: Any = found
    if score in (EXACT_MATCH, R2):
        return msgspec.structs.replace(found, accuracy=None, **{score: told.accuracy})
    if score == PERPLEXITY and told.loss is not None and told.loss <= _LOSS_MAX:
        return msgspec.structs.replace(found, perplexity=perplexity(told.loss))
    return found


def perplexity(loss: float) -> float:
    """Return e to the mean loss of a token in nats; infinite where that is no float64."""
    return math.exp(loss) if loss <= _LOSS_MAX else loss * math.inf
