"""The blocks of any module: found by running it once, and replaced call by call without touching the module."""

import pytest
import torch
from plain_models import CLASSES, WIDTH, Block, Classifier, program
from torch import Tensor, nn

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.anatomy import Anatomy, find_anatomy, replaced, stream


def anatomy_of(module: nn.Module) -> Anatomy:
    return find_anatomy(program(module), batch=3, seq=7)


class Shared(Classifier):
    """One block that is run three times, as ALBERT does."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bias = attention_mask[:, None, :].float()
        x = self.embed(input_ids)
        for _ in range(3):
            x = self.blocks[0](x, bias)
        return self.head(x.mean(1))


class Tupled(Block):
    """Keyword arguments in, a tuple out, as many models of transformers do."""

    def forward(self, x: Tensor, *, bias: Tensor) -> tuple[Tensor, None]:
        return super().forward(x, bias), None


class WithTuples(Classifier):
    def __init__(self) -> None:
        super().__init__((0.5, 0.5))
        self.blocks = nn.ModuleList([Tupled(0.5), Tupled(0.5)])

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x, bias = self.embed(input_ids), attention_mask[:, None, :].float()
        for block in self.blocks:
            x, _ = block(x, bias=bias)
        return self.head(x.mean(1))


def test_the_calls_are_in_order_and_one_side_serves_all() -> None:
    anatomy = anatomy_of(Classifier((1.0, 1.0, 1.0)))
    assert anatomy.path == "blocks"
    assert [call.path for call in anatomy.calls] == ["blocks.0", "blocks.1", "blocks.2"]
    assert [(call.hidden, call.sides) for call in anatomy.calls] == [(0, (1,))] * 3
    assert anatomy.sides == [(0, 1)]
    assert [anatomy.side_indices(layer) for layer in range(3)] == [(0,)] * 3


def test_sides_that_differ_between_layers_are_told_apart() -> None:
    class TwoMasks(Classifier):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x, near = self.embed(input_ids), attention_mask[:, None, :].float()
            far = near * 2
            for i, block in enumerate(self.blocks):
                x = block(x, far if i % 2 else near)
            return self.head(x.mean(1))

    anatomy = anatomy_of(TwoMasks((1.0, 1.0, 1.0)))
    assert sorted(anatomy.sides) == [(0, 1), (1, 1)]
    near, far = anatomy.sides.index((0, 1)), anatomy.sides.index((1, 1))
    assert [anatomy.side_indices(layer) for layer in range(3)] == [(near,), (far,), (near,)]


def test_a_block_that_is_run_thrice_is_three_layers_and_replaced_in_one() -> None:
    module = Shared((1.0,))
    made, anatomy = program(module), anatomy_of(module)
    assert [call.path for call in anatomy.calls] == ["blocks.0"] * 3
    batch = made.make_batch(2, 5)
    bias, x = batch["attention_mask"][:, None, :].float(), module.embed(batch["input_ids"])
    with torch.no_grad(), replaced(anatomy, [None, lambda leaves: leaves[0], None]):
        found = made.logits(batch)
    block = module.blocks[0]
    assert torch.equal(found, module.head(block(block(x, bias), bias).mean(1)))


def test_keyword_arguments_and_tuples_are_put_together_again() -> None:
    module = WithTuples()
    made, anatomy = program(module), anatomy_of(module)
    call = anatomy.calls[1]
    hidden, bias = torch.zeros(2, 5, WIDTH), torch.ones(2, 1, 5)
    assert call.arguments(hidden, (bias,)) == ((hidden,), {"bias": bias})
    assert call.wrap(hidden) == (hidden, None)
    assert stream(call.output).shape == (3, 7, WIDTH)
    batch = made.make_batch(2, 5)
    with replaced(anatomy, [lambda leaves: leaves[0]] * 2):
        assert torch.equal(made.logits(batch), module.head(module.embed(batch["input_ids"]).mean(1)))


def test_an_error_inside_leaves_the_blocks_as_they_were() -> None:
    module = Classifier((1.0, 1.0))
    anatomy = anatomy_of(module)
    with pytest.raises(KeyError), replaced(anatomy, [None, None]):
        raise KeyError
    assert not any("forward" in vars(block) for block in module.blocks)
    assert not any(block._forward_hooks for block in module.blocks)


def test_of_two_chains_the_one_with_more_parameters_is_taken() -> None:
    class Deep(Classifier):
        def __init__(self) -> None:
            super().__init__((1.0, 1.0, 1.0))
            self.neck = nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)])

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x, bias = self.embed(input_ids), attention_mask[:, None, :].float()
            for layer in self.neck:
                x = layer(x)
            for block in self.blocks:
                x = block(x, bias)
            return self.head(x.mean(1))

    assert anatomy_of(Deep()).path == "blocks"


def test_a_module_without_blocks_is_refused_by_name() -> None:
    class Flat(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(torch.zeros(input_ids.shape[0], WIDTH))

    with pytest.raises(ExportError, match=r"Flat: no list of blocks.*nn\.ModuleList"):
        anatomy_of(Flat())


def test_blocks_not_called_in_a_chain_are_refused() -> None:
    class Parallel(Classifier):
        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x, bias = self.embed(input_ids), attention_mask[:, None, :].float()
            return self.head(sum(block(x, bias) for block in self.blocks).mean(1))

    with pytest.raises(ExportError, match=r"in none of blocks \(2 calls\) does each member take"):
        anatomy_of(Parallel((1.0, 1.0)))


def test_a_forward_that_fails_is_named() -> None:
    class Broken(Classifier):
        def forward(self, *_: object, **__: object) -> Tensor:
            raise ValueError("no eos token in it")

    with pytest.raises(
        ExportError, match="Broken: its forward fails on an example batch: no eos token in it"
    ):
        anatomy_of(Broken((0.5, 0.5)))
