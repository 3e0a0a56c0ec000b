"""A mixture of experts as one tensor program: every expert on every token, weighted by the router, no loop over data.

The forms that transformers brings either ask the data which experts to run, know only bf16, or copy a weight matrix for each
token. Registered once, this one serves every model whose experts transformers dispatches.
"""

from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

DENSE = "fleetune_dense"
"""The name to give as ``experts_implementation``."""


def dense_experts(module: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Weighted sum of the experts.

    Args:
        module: an experts module of transformers: its stacked weights and how they are laid out.
        hidden: (tokens, width).
        top_k_index: (tokens, k), the experts of each token.
        top_k_weights: (tokens, k).

    Returns:
        (tokens, width), equal to running only the chosen experts.
    """
    name = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _linear(module, name, hidden[None])  # (experts, tokens, inner)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outer = _linear(module, "down_proj", inner)  # (experts, tokens, width)
    if module.has_post_expert_norm:
        outer = module.post_expert_norm(outer)
    experts = torch.arange(outer.shape[0], device=hidden.device)
    chosen = (top_k_index[..., None] == experts).to(top_k_weights.dtype)  # (tokens, k, experts)
    share = (chosen * top_k_weights[..., None]).sum(1).t()[..., None]  # (experts, tokens, 1)
    return (outer * share).sum(0).to(hidden.dtype)


def _linear(module: Any, name: str, x: Tensor) -> Tensor:
    weight = getattr(module, name)
    result = torch.matmul(x, weight if module.is_transposed else weight.transpose(1, 2))
    return result + getattr(module, f"{name}_bias")[:, None] if module.has_bias else result


ALL_EXPERTS_FUNCTIONS.register(DENSE, dense_experts)
