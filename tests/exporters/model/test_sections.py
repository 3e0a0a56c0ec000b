"""The three sorts of function against torch on the whole module: values, gradients and roles."""

import dataclasses

import pytest
import torch
from plain_models import VOCABULARY, WIDTH, Classifier, program
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from fleetune.device_runtime.contracts.manifest import Input, Targets
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.anatomy import Anatomy, find_anatomy, stream
from fleetune.exporters.model.program import Program
from fleetune.exporters.model.sections import SectionFunction, block, functions_of, head, prelude

SIZES = (3, 7)
Subject = tuple[Program, Anatomy]


@pytest.fixture
def subject() -> Subject:
    torch.manual_seed(0)
    made = program(Classifier((0.5, 0.5)))
    return made, find_anatomy(made, batch=3, seq=7)


def outputs(section: SectionFunction) -> dict[tuple[str, int], Tensor]:
    """The results on the section's own examples, by role and index."""
    found = section.function(*(argument.example for argument in section.arguments))
    assert len(found) == len(section.results)
    return dict(zip(section.results, found, strict=True))


def test_the_prelude_gives_the_first_input_and_every_side(subject: Subject) -> None:
    made, anatomy = subject
    section = prelude(made, anatomy, sizes=SIZES)
    found = outputs(section)
    assert found.keys() == {("hidden", 0), ("side", 0)}
    assert torch.equal(found["hidden", 0], anatomy.calls[0].leaves[0])
    assert torch.equal(found["side", 0], anatomy.calls[0].leaves[1])
    assert [a.name for a in section.arguments if a.role == "batch"] == ["input_ids", "attention_mask"]


def test_a_block_gives_its_output_and_the_gradients_of_its_own(subject: Subject) -> None:
    call = subject[1].calls[1]
    section = block(call, prefix="blocks.1.")
    found = outputs(section)
    dy = next(a.example for a in section.arguments if a.role == "d_hidden")
    x = call.leaves[0].detach().requires_grad_(True)
    y = call.module(x, call.leaves[1])
    learning = {n: p for n, p in call.module.named_parameters() if p.requires_grad}
    dx, *dw = torch.autograd.grad(y, (x, *learning.values()), dy)
    torch.testing.assert_close(found["hidden", 0], y)
    torch.testing.assert_close(found["d_hidden", 0], dx)
    assert {section.slots[i] for role, i in found if role == "d_weight"} == {
        f"blocks.1.{n}" for n in learning
    }
    for (name, _), gradient in zip(learning.items(), dw, strict=True):
        torch.testing.assert_close(found["d_weight", section.slots.index(f"blocks.1.{name}")], gradient)


def test_the_head_gives_loss_logits_and_gradients_of_a_whole_step(subject: Subject) -> None:
    made, anatomy = subject
    section = head(made, anatomy, sizes=SIZES)
    found = outputs(section)
    batch = made.make_batch(*SIZES)
    logits = made.logits(batch)
    loss = made.loss(logits, batch["labels"])
    (wanted,) = torch.autograd.grad(loss, made.module.head.weight)
    torch.testing.assert_close(found["loss", 0], loss)
    torch.testing.assert_close(found["logits", 0], logits)
    torch.testing.assert_close(found["d_weight", section.slots.index("head.weight")], wanted)
    assert {section.slots[i] for role, i in found if role == "d_weight"} == {"head.weight", "head.bias"}
    assert found["d_hidden", 0].shape == stream(anatomy.calls[-1].output).shape
    assert section.targets is None


def test_the_sections_come_in_the_order_of_a_forward_pass(subject: Subject) -> None:
    made, anatomy = subject
    made_all = functions_of(made, anatomy, anatomy.calls, sizes=SIZES)
    assert [section.what for section in made_all] == ["prelude", "blocks.0", "blocks.1", "head"]


def test_trainables_before_the_blocks_are_refused(subject: Subject) -> None:
    made, anatomy = subject
    made.module.embed.requires_grad_(True)
    with pytest.raises(ExportError, match=r"before the blocks cannot learn on the device: embed\.weight"):
        head(made, anatomy, sizes=SIZES)


class Tagger(Classifier):
    """Logits for every token; ``mixed`` adds what the neighbours say."""

    def __init__(self, *, mixed: bool) -> None:
        super().__init__((0.5, 0.5))
        self.head, self.mixed = nn.Linear(WIDTH, VOCABULARY), mixed

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        bias = (1.0 - attention_mask[:, None, :].float()) * -1e4
        x = self.embed(input_ids)
        for layer in self.blocks:
            x = layer(x, bias)
        return self.head(x + x.mean(1, keepdim=True) if self.mixed else x)


def tagged(*, mixed: bool) -> Program:
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), labels.flatten())

    def total(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")

    made = program(Tagger(mixed=mixed))
    inputs = (*made.inputs[:2], Input("labels", "int64", ("batch", "seq"), role="labels"))

    def make_batch(batch: int, seq: int) -> dict[str, Tensor]:
        arrays = made.make_batch(batch, seq)
        return {**arrays, "labels": arrays["input_ids"]}

    how = {"loss": loss, "counted": Targets(shift=0, ignored=-100), "token_loss": total}
    return dataclasses.replace(made, inputs=inputs, make_batch=make_batch, **how)


def test_a_head_that_works_token_by_token_sums_its_loss() -> None:
    made = tagged(mixed=False)
    anatomy = find_anatomy(made, batch=3, seq=7)
    section = head(made, anatomy, sizes=SIZES)
    assert section.targets == Targets(shift=0, ignored=-100)
    torch.testing.assert_close(outputs(section)["loss", 0], made.loss(*logits_and_labels(made)) * 21)


def test_a_head_that_looks_at_other_tokens_runs_whole() -> None:
    made = tagged(mixed=True)
    section = head(made, find_anatomy(made, batch=3, seq=7), sizes=SIZES)
    assert section.targets is None
    torch.testing.assert_close(outputs(section)["loss", 0], made.loss(*logits_and_labels(made)))


def logits_and_labels(made: Program) -> tuple[Tensor, Tensor]:
    batch = made.make_batch(*SIZES)
    return made.logits(batch), batch["labels"]
