"""The same training in torch + peft, eager: what a device's losses are held to."""

from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from pretrained import MINILM

from fleetune.device_runtime.contracts.plans import LayerPlan, Mode


def peft_model(adapter: Path, *, trainable: bool) -> Any:
    """MiniLM with 77 classes and the adapter, dropout off."""
    settings = {"num_labels": 77, "attn_implementation": "eager"}
    base = transformers.AutoModelForSequenceClassification.from_pretrained(MINILM, **settings)
    return PeftModel.from_pretrained(base, str(adapter), is_trainable=trainable).eval()


def torch_losses(model: Any, batches: list[dict[str, Any]], plans: list[LayerPlan]) -> list[float]:
    """AdamW at 2e-3 over ``batches``, a dropped layer the identity."""
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=2e-3, weight_decay=0.0
    )
    layers = model.base_model.model.bert.encoder.layer
    losses = []
    for batch, plan in zip(batches, plans, strict=True):
        for layer, mode in zip(layers, plan, strict=True):
            set_mode(layer, mode)
        optimizer.zero_grad()
        loss = model(**{name: torch.from_numpy(array) for name, array in batch.items()}).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def set_mode(layer: Any, mode: Mode) -> None:
    """Let a layer drop, be gone around (its forward exact, the gradient passed straight through), or rest its LoRA."""
    layer.__dict__.pop("forward", None)
    run = layer.forward
    if mode is Mode.DROP:
        layer.forward = lambda hidden_states, *_, **__: hidden_states
    if mode is Mode.BYPASS:
        layer.forward = lambda hidden, *a, **k: hidden + (run(hidden, *a, **k) - hidden).detach()
    for module in layer.modules():
        if hasattr(module, "lora_B"):
            module.enable_adapters(mode is not Mode.BARE)
