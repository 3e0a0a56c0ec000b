"""KWT-1, an audio keyword transformer of 12 post-norm blocks, as a plain module with its published weights, and its features."""

import wave
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paths import SHARED
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.exporters.model.program import Program

MODEL = SHARED / "models" / "kwt1"
FRAMES, FEATURES, LAYERS, RANK = 98, 40, 12, 4
LABELS = ("_silence_", "_unknown_", "yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
Weights = dict[str, NDArray[np.float32]]


class Block(nn.Module):
    """Attention of one head and an MLP, each followed by its norm; LoRA on query and value is what learns."""

    def __init__(self, weights: Weights, prefix: str) -> None:
        super().__init__()
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        self.frozen = nn.ParameterDict({n.replace(".", "_"): _frozen(w) for n, w in own.items()})
        self.scale, self.eps = float(weights["attn_scale"]), float(weights["ln_eps"])
        width = own["q.w"].shape[0]
        for name in ("q", "v"):
            self.register_parameter(f"lora_{name}_a", nn.Parameter(torch.randn(RANK, width) * 0.02))
            self.register_parameter(f"lora_{name}_b", nn.Parameter(torch.zeros(width, RANK)))

    def forward(self, x: Tensor) -> Tensor:
        w = self.frozen
        q = linear(x, w["q_w"]) + linear(linear(x, self.lora_q_a), self.lora_q_b)
        v = linear(x, w["v_w"]) + linear(linear(x, self.lora_v_a), self.lora_v_b)
        mixed = (q @ linear(x, w["k_w"]).transpose(1, 2) * self.scale).softmax(-1) @ v
        x = layer_norm(x + linear(mixed, w["o_w"], w["o_b"]), x.shape[-1:], w["ln1_g"], w["ln1_b"], self.eps)
        y = linear(gelu(linear(x, w["mlp1_w"], w["mlp1_b"]), approximate="tanh"), w["mlp2_w"], w["mlp2_b"])
        return layer_norm(x + y, x.shape[-1:], w["ln2_g"], w["ln2_b"], self.eps)


class KeywordTransformer(nn.Module):
    """MFCC (batch, 98, 40) -> logits (batch, 12)."""

    def __init__(self, weights: Weights) -> None:
        super().__init__()
        self.embed = nn.Linear(FEATURES, weights["embed.w"].shape[0])
        self.embed.weight, self.embed.bias = _frozen(weights["embed.w"]), _frozen(weights["embed.b"])
        self.cls, self.pos = _frozen(weights["cls"]), _frozen(weights["pos"])
        self.blocks = nn.ModuleList([Block(weights, f"block{i}.") for i in range(LAYERS)])
        self.head = nn.Linear(self.cls.shape[1], len(LABELS))
        self.head.weight = nn.Parameter(torch.tensor(weights["head.w"]))
        self.head.bias = nn.Parameter(torch.tensor(weights["head.b"]))

    def forward(self, mfcc: Tensor) -> Tensor:
        x = torch.cat([self.cls[None].expand(mfcc.shape[0], -1, -1), self.embed(mfcc)], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0])


def keyword_weights() -> Weights:
    """The published weights, or a skip that says what is missing."""
    if not (MODEL / "kwt1_weights.npz").is_file():
        pytest.skip("the keyword transformer is not beside the checkout (shared/models/kwt1)")
    with np.load(MODEL / "kwt1_weights.npz") as file:
        return dict(file)


def keyword_program(weights: Weights) -> Program:
    """The transformer as the exporters take it; its sequence is fixed, its batch is not."""

    def make_batch(batch: int, _seq: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        features = torch.randn(batch, FRAMES, FEATURES, generator=generator)
        return {"mfcc": features, "labels": torch.randint(0, len(LABELS), (batch,), generator=generator)}

    torch.manual_seed(0)
    inputs = (Input("mfcc", "float32", ("batch", FRAMES, FEATURES)), Input("labels", "int64", ("batch",)))
    module = KeywordTransformer(weights).eval()
    return Program(module, lambda logits: logits, cross_entropy, make_batch, inputs, {})


def features_of(recording: str, weights: Weights) -> NDArray[np.float32]:
    """MFCC (1, 98, 40) of one second at 16 kHz, by the tables in the weights file."""
    with wave.open(str(MODEL / recording)) as file:
        samples = np.frombuffer(file.readframes(16000), np.int16).astype(np.float32) / 32768
    samples = np.pad(samples, (0, 16000 - len(samples)))
    front: dict[str, Any] = {
        n.removeprefix("front."): w for n, w in weights.items() if n.startswith("front.")
    }
    frames = np.lib.stride_tricks.sliding_window_view(samples, 480)[::160] * front["window"]  # (98, 480)
    magnitude = np.hypot(frames @ front["dft_re"].T, frames @ front["dft_im"].T)
    bands = np.log(np.maximum(magnitude @ front["mel"].T, front["floor"]))
    return ((bands @ front["dct"].T - front["norm_sub"]) * front["norm_mul"])[None].astype(np.float32)


def _frozen(array: NDArray[np.float32]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(array), requires_grad=False)
