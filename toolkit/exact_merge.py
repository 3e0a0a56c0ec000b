"""Merges a PEFT model, and proves that the merged one is what model and adapter are together."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.models import told_shortly
from fleetune.toolkit.origin import parameter_digests, some

TOLERANCE = 1e-4
"""Largest difference between logits before and after, over the largest logit."""
_ROWS, _TOKENS = 3, 16


def merge_exactly(learning: Any, say: Callable[[str], None]) -> Any:
    """Merge a PEFT model in float32.

    Raises:
        ExportError: the merged model answers otherwise, or something without an adapter has changed.
    """
    learning.eval()
    rows = _rows(learning)
    expected, before = _logits(learning, rows), parameter_digests(learning.get_base_model())
    changing = _changing(learning)
    _unshare(learning, say)
    with told_shortly("the adapter cannot be merged into its model"):
        merged = learning.merge_and_unload().eval()
    _check_untouched(before, parameter_digests(merged), changing)
    error = float((_logits(merged, rows) - expected).abs().max() / expected.abs().max().clamp(min=1e-30))
    if not error <= TOLERANCE:  # NaN is none
        raise ExportError(
            f"the merged model does not answer as model and adapter do: logits differ by {error:.1e} of the largest; "
            "use the adapter as it is"
        )
    return merged


def _changing(learning: Any) -> tuple[str, ...]:
    """Where a merge may change parameters: below modules with an adapter, and those that learn themselves."""
    model, kinds = learning.get_base_model(), (BaseTunerLayer, AuxiliaryTrainingWrapper)
    modules = [f"{name}." for name, module in model.named_modules() if isinstance(module, kinds)]
    return (*modules, *(name for name, p in model.named_parameters() if p.requires_grad))


def _check_untouched(before: dict[str, str], after: dict[str, str], changing: tuple[str, ...]) -> None:
    kept = [name for name in before if not name.startswith(changing)]
    if wrong := [name for name in kept if after.get(name) != before[name]]:
        raise ExportError(f"merging changes what has no adapter: {some(wrong)}; use the adapter as it is")


def _unshare(learning: Any, say: Callable[[str], None]) -> None:
    """Give each module with LoRA weights of its own: tied embeddings and repeated layers have them in common."""
    users: dict[int, int] = {}
    for _, parameter in learning.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    for name, module in learning.get_base_model().named_modules():
        if not (isinstance(module, BaseTunerLayer) and hasattr(module, "lora_A")):
            continue
        base = module.get_base_layer()
        if users.get(id(getattr(base, "weight", None)), 0) > 1:
            base.weight = nn.Parameter(base.weight.detach().clone(), requires_grad=False)
            say(f"note: {name} shared its weights with another module; in the merged model each has its own")


def _rows(learning: Any) -> list[dict[str, Tensor]]:
    """Draw single samples; without padding, so that no padding token is needed."""
    generator, config = torch.Generator().manual_seed(0), learning.config
    if learning.get_base_model().main_input_name == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        shape = (1, config.num_channels, height, width)
        return [{"pixel_values": torch.randn(shape, generator=generator)} for _ in range(_ROWS)]
    text = config.get_text_config()
    length = max(1, min(_TOKENS, (getattr(text, "max_position_embeddings", None) or 1 << 20) - 4))
    drawn = torch.randint(text.vocab_size, (_ROWS, length), generator=generator)
    rows = [*drawn, *(torch.tensor(ids[:length]) for ids in _tokens_of_its_own(learning))]
    return [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in rows]


def _tokens_of_its_own(learning: Any) -> list[list[int]]:
    """Tokens whose embeddings are in the adapter, one by one."""
    indices = getattr(learning.peft_config["default"], "trainable_token_indices", None) or []
    return [list(ids) for ids in (indices.values() if isinstance(indices, dict) else [indices]) if ids]


@torch.no_grad()
def _logits(model: Any, rows: Sequence[dict[str, Tensor]]) -> Tensor:
    with told_shortly("the model cannot be run"):
        return torch.cat([model(**row).logits.flatten() for row in rows])
