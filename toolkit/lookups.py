"""Runs a model on a few tokens to see what its configuration only claims: which tables it reads, whether it looks ahead."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding
from torch.overrides import TorchFunctionMode

from fleetune.toolkit.hearing import told_shortly

_SHORT, _LONG = 3, 4
"""Tokens of the rows that are run."""
_BATCH = 2
_NOISE = 1e-6
"""Of the largest logit: a token that is not seen changes nothing, but for rounding."""


class Lookups(NamedTuple):
    """What bounds a model's inputs.

    ``rows`` are those of the smallest table that an input's ids look up, by input name; ``positions`` are the most tokens that
    there are rows for in a table of positions, None where there is no such table; ``classes`` is the width of the logits.
    """

    rows: dict[str, int]
    positions: int | None
    classes: int


class _Lookup(NamedTuple):
    ids: Tensor
    rows: int


def look_up(model: Any, names: list[str]) -> Lookups:
    """Run ``model`` on rows of two lengths, and see which tables the inputs ``names`` look up.

    A table of positions is one whose largest index grows with the row, whatever it starts from (RoBERTa's at the padding id
    plus one, OPT's at two); one that is indexed by distances (seq, seq) is none. A buffer as long as
    ``max_position_embeddings`` (GPT-J's sines) counts as one too.

    Raises:
        ExportError: the model does not run.
    """
    with told_shortly(f"{type(plain(model)).__name__} does not run on {_BATCH} rows of {_SHORT} tokens"):
        short, long = (_recorded(model, _batch(model, names, seq)) for seq in (_SHORT, _LONG))
    batch, seen, classes = short
    rows = {name: _rows_of(batch[name], seen) for name in names}
    if not rows.get("input_ids"):
        rows["input_ids"] = len(model.get_input_embeddings().weight)
    limits = [
        one.rows - int(one.ids.max()) + _SHORT - 1
        for one, two in zip(seen, long[1], strict=True)
        if _is_by_position(one.ids) and int(two.ids.max()) == int(one.ids.max()) + 1
    ]
    return Lookups({name: count for name, count in rows.items() if count}, _positions(model, limits), classes)


def plain(model: Any) -> Any:
    """The model of transformers inside a PEFT model, or one without an adapter as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def sees_ahead(model: Any, names: list[str]) -> bool:
    """Whether the logits of a token change with the token after it."""
    batch = _batch(model, names, _SHORT)
    other = batch["input_ids"].clone()
    other[:, -1] -= 1
    with torch.no_grad():
        first, second = (model(**row).logits[:, 0] for row in (batch, batch | {"input_ids": other}))
    return bool((first - second).abs().max() > _NOISE * first.abs().max())


class _Recorder(TorchFunctionMode):
    """Keeps what is looked up in tables while it is on."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[_Lookup] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is embedding and len(args) > 1:
            self.seen.append(_Lookup(args[0], len(args[1])))
        return func(*args, **(kwargs or {}))


def _recorded(model: Any, batch: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[_Lookup], int]:
    with torch.no_grad(), _Recorder() as recorder:
        logits = model(**batch).logits
    return batch, recorder.seen, logits.shape[-1]


def _batch(model: Any, names: list[str], seq: int) -> dict[str, Tensor]:
    """Rows of one token that is no padding over and over, unmasked; every other input is zero."""
    padding = getattr(model.config.get_text_config(), "pad_token_id", None)
    fill = {"input_ids": 3 if padding == 2 else 2, "attention_mask": 1}
    return {name: torch.full((_BATCH, seq), fill.get(name, 0)) for name in names}


def _rows_of(given: Tensor, seen: list[_Lookup]) -> int:
    """Rows of the smallest table that was indexed by ``given`` itself, or by a view of it; 0 for none."""
    own = given.untyped_storage().data_ptr()
    return min((one.rows for one in seen if one.ids.untyped_storage().data_ptr() == own), default=0)


def _is_by_position(index: Tensor) -> bool:
    return index.shape[-1] == _SHORT and index.numel() in (_SHORT, _BATCH * _SHORT)


def _positions(model: Any, limits: list[int]) -> int | None:
    claimed = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    held = [claimed] if claimed and any(claimed in b.shape for b in model.buffers()) else []
    return min([*limits, *held], default=None)
