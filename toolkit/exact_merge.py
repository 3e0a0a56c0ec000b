"""Merges a PEFT model, and proves that the merged one is what model and adapter are together."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from fleetune.device_runtime.errors import ExportError, some
from fleetune.exporters.model.mapped import leaving
from fleetune.toolkit.features import FEATURES, feature_input
from fleetune.toolkit.hearing import Tell, told_shortly
from fleetune.toolkit.origin import parameter_digests

TOLERANCE = 1e-4
"""Largest difference between an output before and after, over its largest value."""
_ROWS, _TOKENS = 3, 16


class _Call(NamedTuple):
    """Of a module: what it was given, and what it made of it."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


def merge_exactly(learning: Any, tell: Tell) -> Any:
    """Merge a PEFT model in float32.

    Raises:
        ExportError: the merged model, or one module of it, answers otherwise, or something without an adapter has changed.
    """
    learning.eval()
    rows = _rows(learning)
    before, changing = parameter_digests(learning.get_base_model()), _changing(learning)
    with leaving(learning), _watched(learning) as calls:
        expected = _logits(learning, rows)
    _give_own_weights(learning, tell)
    with told_shortly("the adapter cannot be merged into its model"):
        merged = learning.merge_and_unload().eval()
    _separate(merged)
    _check_untouched(before, parameter_digests(merged), changing)
    errors = {
        name: _error(_output(merged.get_submodule(name), call), call.output) for name, call in calls.items()
    }
    with leaving(merged):
        errors["logits"] = _error(_logits(merged, rows), expected)
    if wrong := [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]:
        raise ExportError(
            f"the merged model does not answer as model and adapter do: {some(wrong)} of its largest value; "
            "use the adapter as it is"
        )
    return merged


def _changing(learning: Any) -> tuple[str, ...]:
    """Where a merge may change parameters: below modules with an adapter, and those that learn themselves."""
    model, kinds = learning.get_base_model(), (BaseTunerLayer, AuxiliaryTrainingWrapper)
    modules = [f"{name}." for name, module in model.named_modules() if isinstance(module, kinds)]
    return (*modules, *(name for name, p in model.named_parameters() if p.requires_grad))


def _lora_layers(learning: Any) -> list[tuple[str, Any]]:
    modules = learning.get_base_model().named_modules()
    return [(name, m) for name, m in modules if isinstance(m, BaseTunerLayer) and hasattr(m, "lora_A")]


def _check_untouched(before: dict[str, str], after: dict[str, str], changing: tuple[str, ...]) -> None:
    kept = [name for name in before if not name.startswith(changing)]
    if wrong := [name for name in kept if after.get(name) != before[name]]:
        raise ExportError(f"merging changes what has no adapter: {some(wrong)}; use the adapter as it is")


def _give_own_weights(learning: Any, tell: Tell) -> None:
    """Give each module with LoRA weights of its own: tied embeddings and repeated layers have them in common.

    Merging writes into them: in a mapped file that would keep all of the file's weights in memory (``mapped``).
    """
    users: dict[int, int] = {}
    for _, parameter in learning.named_parameters(remove_duplicate=False):
        users[id(parameter)] = users.get(id(parameter), 0) + 1
    for name, module in _lora_layers(learning):
        base = module.get_base_layer()
        weight = getattr(base, "weight", None)
        if not isinstance(weight, nn.Parameter):
            continue
        if users[id(weight)] > 1:
            tell(f"{name} shared its weights with another module; in the merged model each has its own")
        base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)


def _separate(merged: Any) -> None:
    """Give layers that a configuration repeats weights of their own; what transformers itself ties stays tied."""
    tied, seen = set(getattr(merged, "all_tied_weights_keys", None) or ()), set()
    for name, parameter in [*merged.named_parameters(remove_duplicate=False)]:
        if id(parameter) in seen and name not in tied:
            module, _, own = name.rpartition(".")
            own_copy = nn.Parameter(parameter.detach().clone(), requires_grad=False)
            setattr(merged.get_submodule(module), own, own_copy)
        seen.add(id(parameter))


@contextmanager
def _watched(learning: Any) -> Iterator[dict[str, _Call]]:
    """Keep the last call of each module with an adapter."""
    calls: dict[str, _Call] = {}

    def keep(name: str) -> Callable[..., None]:
        def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            if isinstance(output, Tensor):
                calls[name] = _Call(args, kwargs, output)

        return hook

    handles = [
        module.register_forward_hook(keep(name), with_kwargs=True) for name, module in _lora_layers(learning)
    ]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _output(module: nn.Module, call: _Call) -> Tensor:
    found: Tensor = module(*call.args, **call.kwargs)
    return found


def _error(found: Tensor, expected: Tensor) -> float:
    """Largest difference, over the largest value."""
    return float((found - expected).abs().max() / expected.abs().max().clamp(min=1e-30))


def _rows(learning: Any) -> list[dict[str, Tensor]]:
    """Draw single samples; without padding, so that no padding token is needed."""
    generator, config = torch.Generator().manual_seed(0), learning.config
    feature = learning.get_base_model().main_input_name
    if feature in FEATURES:
        given = feature_input(feature, config, length=None, tell=lambda _: None)
        shape = (1, *(size for size in given.shape if isinstance(size, int)))
        return [{feature: torch.randn(shape, generator=generator)} for _ in range(_ROWS)]
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
