"""From a Python function of tensors to an exported program with dynamic batch and sequence, backward included."""

import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from fleetune.device_runtime.errors import ExportError

Traceable = Callable[..., Sequence[Tensor]]
SIZES = ("batch", "seq", "past", "total")
"""What the sizes that a trace is given are called, in their order; of most functions there are two."""
_LOUD = (
    "torch.export",
    "torch.fx",
    "torch._dynamo",
    "torch.onnx",
    "torch.utils._pytree",
    "torchao",
    "executorch",
)


def trace(
    function: Traceable,
    arguments: Sequence[Tensor],
    *,
    what: str,
    sizes: Sequence[int],
    data: Sequence[bool],
    decompositions: Mapping[Any, Callable[..., Any]] = MappingProxyType({}),
    bounds: tuple[int, int] | None = None,
    names: Sequence[str] = (),
) -> ExportedProgram:
    """Trace ``function(*arguments)``.

    Args:
        function: returns a sequence of tensors; may call ``torch.autograd.grad`` (not ``torch.func.vjp``, whose wrappers
            make the tracer specialise the sizes).
        arguments: example tensors.
        what: named in errors.
        sizes: those of the examples, as ``SIZES`` names them.
        data: for each argument, whether its dimensions of those sizes are dynamic (weights have none).
        decompositions: operators to spell otherwise, beside the core ATen ones.
        bounds: largest (batch, sequence) that the program must take, or None for any.
        names: of the arguments, for errors; else they are numbered.

    Raises:
        ExportError: the tracer cannot follow; names the module's line and the operator. Or it took a size for a constant.
    """
    shapes = tuple(
        {i: _dim(sizes.index(extent), bounds) for i, extent in enumerate(a.shape) if extent in sizes}
        if is_data
        else {}
        for a, is_data in zip(arguments, data, strict=True)
    )
    try:
        with quiet():
            graph = make_fx(
                function,
                tracing_mode="symbolic",
                decomposition_table={**core_aten_decompositions(), **decompositions},
                _allow_non_fake_inputs=True,
            )(*arguments)
            _check_sizes(graph, data, names or list(map(str, range(len(data)))), what=what, sizes=sizes)
            return torch.export.export(_Held(graph), tuple(arguments), dynamic_shapes=(shapes,), strict=False)
    except ExportError:
        raise
    except Exception as exc:
        raise ExportError(f"{what}: tracing stopped at {_place(exc)}: {_first_line(exc)}") from exc


def fixed_size(what: str, name: str, argument: str) -> ExportError:
    """The refusal of a function that is right at one batch or sequence size alone."""
    return ExportError(
        f"{what}: the trace fixed the {name} size of {argument}: the forward computes with this {name} size as a plain number "
        "and would be wrong at any other, as models with ALiBi do; such a model cannot be exported, choose another"
    )


def _check_sizes(
    graph: torch.fx.GraphModule,
    data: Sequence[bool],
    names: Sequence[str],
    *,
    what: str,
    sizes: Sequence[int],
) -> None:
    """Refuse a trace that took one of the sizes for a constant: other batches would silently get wrong numbers."""
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    for node, is_data, argument in zip(inputs, data, names, strict=True):
        extents = (
            list(map(str, node.meta["val"].shape)) if is_data else []
        )  # a symbol that became a number is one here
        for name, size in zip(SIZES, sizes, strict=False):
            if str(size) in extents:
                raise fixed_size(what, name, argument)


def _dim(which: int, bounds: tuple[int, int] | None) -> Any:
    return Dim.AUTO if bounds is None else Dim.AUTO(max=bounds[which])


class _Held(nn.Module):
    def __init__(self, graph: torch.fx.GraphModule) -> None:
        super().__init__()
        self.graph_module = graph

    def forward(self, *arguments: Tensor) -> Sequence[Tensor]:
        return self.graph_module(*arguments)  # type: ignore[no-any-return]


@contextmanager
def quiet() -> Iterator[None]:
    """Tracers warn about things that are as they should be; the golden step is what decides."""
    loggers = [logging.getLogger(name) for name in _LOUD]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)


def _place(exc: BaseException) -> str:
    """The innermost line outside torch: the module that broke tracing."""
    frames = [f for f in traceback.extract_tb(exc.__traceback__) if "/torch/" not in f.filename]
    if not frames:
        return "an unknown place"
    frame = frames[-1]
    return f"{frame.filename.rsplit('site-packages/', 1)[-1]}:{frame.lineno} ({frame.line})"


def _first_line(exc: BaseException) -> str:
    return (str(exc).strip().splitlines() or [type(exc).__name__])[0]
