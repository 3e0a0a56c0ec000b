"""Functions with their backward become programs that take any batch and sequence; what cannot be followed is named."""

import logging
import warnings

import pytest
import torch
from torch import Tensor

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.tracing import quiet, trace

SIZES = (3, 37)


def squared(x: Tensor, w: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    with torch.enable_grad():
        x = x.detach().requires_grad_(True)
        y = (x @ w) ** 2
        return y, *torch.autograd.grad(y, x, dy)


def given(batch: int, seq: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(batch)
    return [torch.randn(shape, generator=generator) for shape in ((batch, seq, 4), (4, 5), (batch, seq, 5))]


def test_the_backward_is_in_the_program_and_any_size_will_do() -> None:
    program = trace(squared, given(*SIZES), what="it", sizes=SIZES, data=[True, False, True])
    for sizes in ((1, 1), (2, 9)):
        inputs = given(*sizes)
        for found, expected in zip(program.module()(*inputs), squared(*inputs), strict=True):
            torch.testing.assert_close(found, expected)


def test_a_weight_keeps_its_sizes_though_they_look_like_a_batch() -> None:
    arguments = [torch.randn(3, 37, 4), torch.randn(4, 3)]
    program = trace(lambda x, w: (x @ w,), arguments, what="it", sizes=SIZES, data=[True, False])
    shapes = [node.meta["val"].shape for node in program.graph.nodes if node.op == "placeholder"]
    assert [isinstance(extent, int) for extent in shapes[0]] == [False, False, True]
    assert list(shapes[1]) == [4, 3]


def test_a_size_that_became_a_constant_is_refused() -> None:
    """Tensor indexing asks for a plain number; at other sizes the program would give another token's values."""

    def last(x: Tensor) -> tuple[Tensor]:
        return (x[torch.arange(x.shape[0]), x.shape[1] - 1],)

    with pytest.raises(ExportError, match="it: the trace fixed the seq size of hidden"):
        trace(last, [torch.randn(3, 37, 4)], what="it", sizes=SIZES, data=[True], names=["hidden"])


def test_bounds_are_kept() -> None:
    program = trace(
        lambda x: (x * 2,), [torch.randn(3, 37)], what="it", sizes=SIZES, data=[True], bounds=(8, 64)
    )
    assert sorted(int(limits.upper) for limits in program.range_constraints.values()) == [8, 64]


def test_an_operator_is_spelled_as_asked() -> None:
    aten = torch.ops.aten
    spelled = {aten.mm.default: lambda a, b: (a[:, :, None] * b[None]).sum(1)}
    program = trace(
        lambda a, b: (a @ b,), [torch.randn(3, 4), torch.randn(4, 5)], what="it", sizes=SIZES,
        data=[True, False], decompositions=spelled,
    )  # fmt: skip
    assert aten.mm.default not in {node.target for node in program.graph.nodes}


def test_a_function_that_asks_its_data_names_the_line() -> None:
    def branching(x: Tensor) -> tuple[Tensor]:
        return (x * 2 if bool(x.sum() > 0) else x,)

    with pytest.raises(ExportError, match=r"blocks\.7: tracing stopped at .*test_tracing\.py:\d+ .*x\.sum"):
        trace(branching, [torch.randn(3, 37)], what="blocks.7", sizes=SIZES, data=[True])


def test_a_refusal_of_our_own_comes_through_as_it_is() -> None:
    def refusing(_: Tensor) -> tuple[Tensor]:
        raise ExportError("mine")

    with pytest.raises(ExportError, match=r"^mine$"):
        trace(refusing, [torch.randn(3, 37)], what="it", sizes=SIZES, data=[True])


def test_quiet_ends_with_an_error_too() -> None:
    log = logging.getLogger("torch.export")
    before = log.level
    with quiet():
        assert log.level == logging.ERROR
        warnings.warn("not heard", UserWarning, stacklevel=1)
    with pytest.raises(KeyError), quiet():
        raise KeyError
    assert log.level == before
