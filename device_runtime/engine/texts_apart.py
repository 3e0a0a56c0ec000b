"""Texts that lie in one sequence, held apart: none sees another, and each begins at the first position.

Shapes: B sequences, S tokens, T texts, L tokens of the longest text, H width of the hidden stream.
"""

import numpy as np
from numpy.typing import NDArray

from fleetune.device_runtime.arrays import Array, Indices

Numbers = NDArray[np.int64]
"""Of each token (B, S) the number of its text in the sequence, from 1; 0 of padding."""


def are_packed(numbers: Numbers) -> bool:
    """Whether any sequence has more than one text."""
    return bool(numbers.max(initial=0) > 1)


def places_of(numbers: Numbers) -> tuple[Indices, Indices, NDArray[np.bool_]]:
    """Where the tokens of each text are.

    Returns:
        The sequence and the place in it of each token, int64 (T, L) both, and which of these are tokens: all others are padding.
    """
    starts = np.flatnonzero((np.diff(numbers, prepend=0, axis=1) != 0).ravel() & (numbers.ravel() > 0))
    rows, first = np.divmod(starts, numbers.shape[1])
    lengths = (numbers[rows] == numbers[rows, first][:, None]).sum(1)
    offsets = np.arange(int(lengths.max(initial=0)))
    is_token = offsets < lengths[:, None]
    return (
        np.broadcast_to(rows[:, None], is_token.shape),
        np.where(is_token, first[:, None] + offsets, first[:, None]),
        is_token,
    )


def shut(mask: Array, numbers: Numbers) -> Array:
    """An attention mask (B, 1, S, S), added to scores or true where a token sees another, shut between texts; a copy."""
    is_text = numbers > 0
    differ = numbers[:, :, None] != numbers[:, None, :]
    between = (differ & is_text[:, :, None] & is_text[:, None, :])[:, None]
    closed = False if mask.dtype == np.bool_ else np.finfo(str(mask.dtype)).min
    return np.where(between, np.asarray(closed, mask.dtype), mask)
