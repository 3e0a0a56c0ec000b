"""KWT-1, a published audio transformer of 12 post-norm blocks, for spoken digits: the module, and features from log-mel bands.

The weights are those of github.com/ARM-software/keyword-transformer (Apache-2.0). LoRA on query and value, and a new head, learn.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, layer_norm, linear

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.exporters.model.program import Program
from fleetune.exporters.writing import Description, write_artifact

FRAMES, FEATURES, LAYERS = 98, 40, 12
DIGITS = tuple(str(i) for i in range(10))
_BANDS_HZ, _HOP_S, _FRAME_S = (50.0, 4000.0), 0.016, 0.010
"""Of the log-mel bands that are at hand, and the time between the frames that the model takes."""
Weights = dict[str, NDArray[np.float32]]


class Adapted(nn.Module):
    """A frozen matrix with LoRA beside it, named as PEFT names its factors."""

    def __init__(self, weight: NDArray[np.float32], *, rank: int) -> None:
        super().__init__()
        self.weight = _frozen(weight)
        out, width = weight.shape
        self.lora_A, self.lora_B = (nn.Linear(a, b, bias=False) for a, b in ((width, rank), (rank, out)))
        nn.init.normal_(self.lora_A.weight, std=0.02)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        plus: Tensor = self.lora_B(self.lora_A(x))
        return linear(x, self.weight) + plus


class Block(nn.Module):
    """Attention of one head and an MLP, each followed by its norm."""

    def __init__(self, weights: Weights, prefix: str, *, rank: int) -> None:
        super().__init__()
        own = {n.removeprefix(prefix): w for n, w in weights.items() if n.startswith(prefix)}
        self.scale, self.eps = float(weights["attn_scale"]), float(weights["ln_eps"])
        self.query, self.value = (Adapted(own.pop(f"{n}.w"), rank=rank) for n in ("q", "v"))
        self.frozen = nn.ParameterDict({n.replace(".", "_"): _frozen(w) for n, w in own.items()})

    def forward(self, x: Tensor) -> Tensor:
        """(B, S, H) -> (B, S, H)."""
        w = self.frozen
        scores = self.query(x) @ linear(x, w["k_w"]).transpose(1, 2) * self.scale
        mixed = scores.softmax(-1) @ self.value(x)
        x = layer_norm(x + linear(mixed, w["o_w"], w["o_b"]), x.shape[-1:], w["ln1_g"], w["ln1_b"], self.eps)
        y = linear(gelu(linear(x, w["mlp1_w"], w["mlp1_b"]), approximate="tanh"), w["mlp2_w"], w["mlp2_b"])
        return layer_norm(x + y, x.shape[-1:], w["ln2_g"], w["ln2_b"], self.eps)


class KeywordTransformer(nn.Module):
    """MFCC (B, 98, 40) -> logits (B, 10)."""

    def __init__(self, weights: Weights, *, rank: int) -> None:
        super().__init__()
        self.embed_w, self.embed_b = _frozen(weights["embed.w"]), _frozen(weights["embed.b"])
        self.cls, self.pos = _frozen(weights["cls"]), _frozen(weights["pos"])
        self.blocks = nn.ModuleList([Block(weights, f"block{i}.", rank=rank) for i in range(LAYERS)])
        self.classifier = nn.Linear(self.cls.shape[1], len(DIGITS))

    def forward(self, mfcc: Tensor) -> Tensor:
        """(B, 98, 40) -> (B, 10)."""
        tokens = linear(mfcc, self.embed_w, self.embed_b)
        x = torch.cat([self.cls[None].expand(mfcc.shape[0], -1, -1), tokens], 1) + self.pos
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.classifier(x[:, 0])
        return logits


def export_keywords(weights: Weights, out: Path, *, rank: int = 4, seed: int = 0) -> None:
    """Write the artifact."""

    def make_batch(batch: int, _seq: int) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(batch)
        features = torch.randn(batch, FRAMES, FEATURES, generator=generator)
        return {"mfcc": features, "labels": torch.randint(0, len(DIGITS), (batch,), generator=generator)}

    torch.manual_seed(seed)
    inputs = (
        Input("mfcc", "float32", ("batch", FRAMES, FEATURES)),
        Input("labels", "int64", ("batch",), role="labels"),
    )
    module = KeywordTransformer(weights, rank=rank).eval()
    program = Program(module, lambda logits: logits, cross_entropy, make_batch, inputs, {})
    description = Description("kwt1", "KeywordTransformer", "image-classification", DIGITS, {})
    write_artifact(program, description, out)


def features_of(bands: NDArray[np.float32], weights: Weights) -> NDArray[np.float32]:
    """What the model takes, from other bands than its own: an approximation, for the recordings are not at hand.

    Frames are interpolated in time, bands on the mel scale; above 4 kHz, and after the recording, there is silence.

    Args:
        bands: log10 power, (N, frames, bands).
        weights: with the ``front.`` tables.

    Returns:
        MFCC (N, 98, 40).
    """
    front: dict[str, Any] = {
        n.removeprefix("front."): w for n, w in weights.items() if n.startswith("front.")
    }
    hertz = np.arange(front["mel"].shape[1]) * 16000 / (2 * (front["mel"].shape[1] - 1))
    centres = _mel((front["mel"] * hertz).sum(1) / np.maximum(front["mel"].sum(1), 1e-9))
    own = np.linspace(*_mel(np.array(_BANDS_HZ)), bands.shape[2] + 2)[1:-1]
    silence = float(bands.min())
    at_hand = np.concatenate([bands, np.full((*bands.shape[:2], 1), silence)], 2)
    in_bands = _interpolated(at_hand, np.append(own, own[-1] + 50), centres)
    times = np.arange(FRAMES) * _FRAME_S
    in_time = _interpolated(in_bands.transpose(0, 2, 1), np.arange(bands.shape[1]) * _HOP_S, times)
    in_time[:, :, times > bands.shape[1] * _HOP_S] = silence
    magnitude = in_time.transpose(0, 2, 1) * (np.log(10) / 2)  # power to the logarithm of a magnitude
    made = (magnitude @ front["dct"].T - front["norm_sub"]) * front["norm_mul"]
    return np.asarray(made, np.float32)


def _interpolated(values: NDArray[Any], places: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
    """``values`` (…, len(places)) at other places of the last axis, linearly."""
    upper = np.clip(np.searchsorted(places, wanted), 1, len(places) - 1)
    share = np.clip((wanted - places[upper - 1]) / (places[upper] - places[upper - 1]), 0, 1)
    return np.asarray(values[..., upper - 1] * (1 - share) + values[..., upper] * share)


def _mel(hertz: NDArray[Any]) -> NDArray[Any]:
    return np.asarray(1127 * np.log1p(hertz / 700))


def _frozen(array: NDArray[np.float32]) -> nn.Parameter:
    return nn.Parameter(torch.tensor(array), requires_grad=False)
