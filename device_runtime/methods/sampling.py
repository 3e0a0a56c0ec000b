"""Which token comes next: the likeliest one, or one that is drawn (temperature, nucleus sampling)."""

from typing import Annotated

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Array
from fleetune.device_runtime.draws import SEED_MAX, Key, uniforms
from fleetune.device_runtime.options import Option


class Sampling(msgspec.Struct, frozen=True, kw_only=True):
    """How text goes on, and for how long."""

    max_tokens: Annotated[int, Option("tokens to write at most", at_least=1)] = 128
    temperature: Annotated[
        float, Option("0 takes the likeliest token; above it draws, the flatter the higher", at_least=0)
    ] = 0.0
    top_p: Annotated[
        float,
        Option("draw among the likeliest tokens whose probabilities come to this share", above=0, at_most=1),
    ] = 1.0
    seed: Annotated[int, Option("seed of the draws", at_least=0, at_most=SEED_MAX)] = 0


def next_token(logits: Array, sampling: Sampling, number: int) -> int:
    """Choose a token of ``logits`` (vocabulary,) for place ``number`` of the text, counted from 0.

    Of equal ones the lowest id comes first. The draw is made under the stream ``tokens`` (``docs/draws.md``).

    Source of ``top_p``: Holtzman, Buys, Du, Forbes and Choi, "The curious case of neural text degeneration", arXiv 1904.09751.
    """
    if not sampling.temperature:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    chances = np.exp(scaled[order] - scaled[order[0]])
    ends = np.cumsum(chances)
    among = 1 + int(np.searchsorted(ends[:-1], sampling.top_p * ends[-1]))
    (drawn,) = uniforms(Key(sampling.seed, "tokens", number), 1)
    return int(order[np.searchsorted(ends[:among], drawn * ends[among - 1], side="right")])
