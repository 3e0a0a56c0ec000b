"""Calls a transformers model on new tokens alone: its cache holds what the exporters' memory gives it."""

import inspect
from typing import Any

from torch import Tensor
from transformers import Cache

from fleetune.exporters.model.program import Remembers, Stepping
from fleetune.toolkit.lookups import plain

_NAMES = ("cache", "past_key_values")
"""What the argument is called, the newer name first."""
_MASK = "attention_mask"


def stepping_of(model: Any, names: list[str]) -> Stepping | None:
    """How a model with the inputs ``names`` runs on new tokens; None for one without a mask or a cache."""
    accepted = inspect.signature(plain(model).forward).parameters
    name = next((known for known in _NAMES if known in accepted), None)
    if name is None or _MASK not in names:
        return None
    return Stepping(lambda memory: {name: _Remembered(memory), "use_cache": True}, whole=(_MASK,))


class _Remembered(Cache):  # type: ignore[misc]  # transformers is untyped
    """A cache of full attention in every layer: what a window hides, the mask hides."""

    def __init__(self, memory: Remembers) -> None:
        self._memory = memory
        self.layers: list[Any] = []

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        return self._memory.extend(key_states, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._memory.length

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self._memory.length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._memory.length + query_length, 0
