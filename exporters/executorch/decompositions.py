"""Operators spelled in those that XNNPACK takes: matrix products as ``bmm``, reductions as products with ones.

XNNPACK delegates ``mm`` and ``addmm`` only with constant weights, no ``sum`` at all, and neither layer norm nor ``erf``; what it
leaves runs on portable kernels, 39 times slower for a block.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

aten = torch.ops.aten
_AS_IT_IS: Tensor = NotImplemented  # tells the tracer to keep the operator
_TINY = (
    1.2345e-30  # turns the slope's 0 / 0 at zero into 1 / 2; no number that is not smaller than 1e-22 notices
)
_CUBE = 0.044715


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``aten.mm`` as a batch of one."""
    product: Tensor = aten.bmm(a.unsqueeze(0), b.unsqueeze(0)).view(a.shape[0], b.shape[1])
    return product


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """``aten.addmm``: the product, then the bias."""
    product = mm(a, b)
    product = product if alpha == 1 else product * alpha
    return product + (bias if beta == 1 else bias * beta)


def total(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """``aten.sum`` over the first or the last dimensions, as a product with ones."""
    if not x.is_floating_point() or dtype not in (None, x.dtype):
        return _AS_IT_IS
    summed = sorted(d % x.dim() for d in (dims or range(x.dim())))
    count, rank = len(summed), x.dim()
    shape = [1 if i in summed else e for i, e in enumerate(x.shape) if keepdim or i not in summed]
    if summed == list(range(rank - count, rank)):
        rows, columns = math.prod(x.shape[: rank - count]), math.prod(x.shape[rank - count :])
        return _bmm(x.reshape(1, rows, columns), x.new_ones((1, columns, 1)), shape)
    if summed == list(range(count)):
        rows, columns = math.prod(x.shape[:count]), math.prod(x.shape[count:])
        return _bmm(x.new_ones((1, 1, rows)), x.reshape(1, rows, columns), shape)
    return _AS_IT_IS


def mean(x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    """``aten.mean`` as the sum over the count."""
    if not x.is_floating_point() or dtype not in (None, x.dtype):
        return _AS_IT_IS
    count = math.prod(x.shape[d] for d in (dims or range(x.dim())))
    summed: Tensor = aten.sum.dim_IntList(x, dims, keepdim)
    return summed / count


def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``aten.native_layer_norm``: output, mean, and the reciprocal of the standard deviation."""
    dims = list(range(x.dim() - len(shape), x.dim()))
    center = mean(x, dims, True)
    centred = x - center
    scale = torch.rsqrt(mean(centred * centred, dims, True) + eps)
    y = centred * scale
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), center, scale


def power(x: Tensor, exponent: float) -> Tensor:
    """``aten.pow`` with a small whole exponent as products."""
    if not x.is_floating_point() or exponent not in (2, 3, 4):
        return _AS_IT_IS
    square = x * x
    return square if exponent == 2 else square * (x if exponent == 3 else square)


def gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """``aten.gelu``: XNNPACK has the exact one, and would take it for the approximate one too."""
    if approximate == "none":
        return _AS_IT_IS
    return 0.5 * x * (1 + torch.tanh(_inner(x)))


def erf(x: Tensor) -> Tensor:
    """``aten.erf`` within 3e-7 by the kernel of gelu, whose value at w = sqrt(2) x is w (1 + erf) / 2."""
    w = x * math.sqrt(2) + _TINY
    return nn.functional.gelu(w) / w * 2 - 1


def gelu_backward(dy: Tensor, x: Tensor, *, approximate: str = "none") -> Tensor:
    """``aten.gelu_backward`` by the forward's own kernel: the slope is gelu(x) / x + x exp(-x^2 / 2) / sqrt(2 pi)."""
    if approximate == "none":
        density = torch.exp(x * x * -0.5) * (1 / math.sqrt(2 * math.pi))
        return dy * ((nn.functional.gelu(x) + _TINY / 2) / (x + _TINY) + x * density)
    t = torch.tanh(_inner(x))
    inner_slope = math.sqrt(2 / math.pi) * (1 + 3 * _CUBE * x * x)
    return dy * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner_slope)


def _bmm(a: Tensor, b: Tensor, shape: Sequence[int]) -> Tensor:
    product: Tensor = aten.bmm(a, b).view(shape)
    return product


def _inner(x: Tensor) -> Tensor:
    return math.sqrt(2 / math.pi) * (x + _CUBE * x * x * x)


DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: mm,
    aten.addmm.default: addmm,
    aten.sum.dim_IntList: total,
    aten.mean.dim: mean,
    aten.native_layer_norm.default: layer_norm,
    aten.gelu.default: gelu,
    aten.gelu_backward.default: gelu_backward,
    aten.erf.default: erf,
    aten.pow.Tensor_Scalar: power,
}
