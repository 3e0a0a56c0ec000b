"""What the int8 graphs compute, in torch: the golden step of an int8 artifact is recorded under it."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fleetune.exporters.model.quantize import derive, split_form

_LEVELS = 255
_TINY = 1e-30


class Int8Products(TorchFunctionMode):
    """For the duration, products with the matrices that ``slots`` store as int8 round what they multiply, as the graphs do."""

    def __init__(self, tensors: Mapping[str, Tensor], slots: Iterable[str]) -> None:
        """``tensors`` by name, already rounded to what int8 keeps of them; ``slots`` as written into the artifact."""
        super().__init__()
        forms = [(name, form) for name, form in map(split_form, slots) if form.startswith("int8")]
        self._scales = {id(tensors[n]): _scale_of(n, tensors[n], f) for n, f in forms}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Take over ``linear``, ``addmm`` and ``matmul`` with such a matrix; anything else goes its way."""
        if found := _operands(func, args, kwargs or {}):
            x, weight, bias, turned = found
            if id(weight) in self._scales:
                matrix = weight.t() if turned else weight
                product = _Product.apply(x, matrix, self._scales[id(weight)])  # type: ignore[no-untyped-call]
                return product if bias is None else product + bias
        return func(*args, **(kwargs or {}))


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, matrix: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(matrix, scale)
        return as_uint8(x) @ matrix

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        matrix, scale = ctx.saved_tensors
        scaled = gradients[0] * scale
        largest = scaled.abs().amax(-1, keepdim=True).clamp(min=_TINY)
        return (as_uint8(scaled / largest) @ (matrix / scale).round().t()) * largest, None, None


def as_uint8(x: Tensor) -> Tensor:
    """What DynamicQuantizeLinear keeps of ``x``: 256 steps between its least and its largest value, zero among them."""
    low, high = x.min().clamp(max=0), x.max().clamp(min=0)
    step = (high - low) / _LEVELS
    if step == 0:
        return x
    zero = (-low / step).round()
    return (((x / step).round() + zero).clamp(0, _LEVELS) - zero) * step


def _scale_of(name: str, tensor: Tensor, form: str) -> Tensor:
    return derive(name, tensor, form.replace("int8", "scale"))


def _operands(
    func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor | None, bool] | None:
    """Left operand, weight, bias, and whether the weight is (out, in)."""
    if func is torch.nn.functional.linear:
        bias = args[2] if len(args) > 2 else kwargs.get("bias")
        return (args[0], args[1] if len(args) > 1 else kwargs["weight"], bias, True) if args else None
    if func is torch.addmm and len(args) == 3 and not kwargs:
        return args[1], args[2], args[0], False
    if func in (torch.matmul, torch.mm, torch.Tensor.matmul, torch.Tensor.__matmul__) and len(args) == 2:
        return args[0], args[1], None, False
    return None
