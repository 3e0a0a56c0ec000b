"""Small transformers that no library knows."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu

from fleetune.device_runtime.contracts.manifest import Input, Targets
from fleetune.exporters.model.program import Program
from fleetune.exporters.writing import Description, write_artifact

WIDTH, CLASSES, VOCABULARY = 16, 5, 64


class Block(nn.Module):
    """Pre-norm attention and MLP; ``scale`` is an attribute that no parameter shows."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = scale
        self.norm = nn.LayerNorm(WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.down = nn.Linear(WIDTH, 4, bias=False)
        self.up = nn.Linear(4, WIDTH, bias=False)
        for parameter in (*self.norm.parameters(), *self.qkv.parameters()):
            parameter.requires_grad_(False)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        mixed = (q @ k.transpose(1, 2) * self.scale + bias).softmax(-1) @ v
        return x + self.up(gelu(self.down(mixed)))


class Classifier(nn.Module):
    def __init__(self, scales: tuple[float, ...]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH).requires_grad_(False)
        self.blocks = nn.ModuleList([Block(s) for s in scales])
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bias = (1.0 - attention_mask[:, None, :].float()) * -1e4
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, bias)
        weight = attention_mask[..., None].float()
        return self.head((x * weight).sum(1) / weight.sum(1))


def program(module: nn.Module) -> Program:
    def make_batch(batch: int, seq: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch * 100 + seq)
        mask = torch.ones(batch, seq, dtype=torch.int64)
        mask[1:, seq // 2 :] = 0
        ids = torch.randint(0, VOCABULARY, (batch, seq), generator=generator)
        labels = torch.randint(0, CLASSES, (batch,), generator=generator)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}

    rows = [Input(n, "int64", ("batch", "seq")) for n in ("input_ids", "attention_mask")]
    inputs = (*rows, Input("labels", "int64", ("batch",), role="labels"))
    counted = Targets(shift=0, ignored=-100)
    return Program(
        module.eval(), lambda output: output, cross_entropy, make_batch, inputs, {}, counted=counted
    )


def export(module: nn.Module, out: Path) -> Program:
    made = program(module)
    description = Description("plain", type(module).__name__, "sequence-classification", tuple("abcde"), {})
    write_artifact(made, description, out)
    return made
