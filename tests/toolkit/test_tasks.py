"""What a task means: losses by hand, and labels that its loss takes."""

import math

import pytest
import torch

from fleetune.toolkit.labels import HAS_CLASSES
from fleetune.toolkit.tasks import IGNORED, TASKS, classification_loss, next_token_loss, token_loss


def test_a_classification_loss_by_hand() -> None:
    logits = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])
    assert classification_loss(logits, torch.tensor([0, 1])).item() == pytest.approx(
        (math.log(4 / 3) + math.log(2)) / 2
    )


def test_ignored_tokens_count_for_nothing() -> None:
    logits = torch.tensor([[[math.log(3.0), 0.0], [5.0, -5.0], [0.0, 0.0]]])
    labels = torch.tensor([[0, IGNORED, 1]])
    assert token_loss(logits, labels).item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2)
    assert token_loss(logits, torch.full((1, 3), IGNORED)).item() == 0


def test_the_next_token_is_what_is_predicted() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 0, 2] = math.log(3.0)  # token 0 expects token 1 to be a 2
    labels = torch.tensor([[1, 2, IGNORED]])
    assert next_token_loss(logits, labels).item() == pytest.approx(math.log(6 / 3))


def test_a_token_loss_is_the_mean_of_its_sum() -> None:
    made = TASKS["causal-lm"].token_loss
    assert made is not None
    logits, labels = torch.randn(2, 5, 7), torch.randint(0, 7, (2, 5))
    shifted = labels[:, 1:]
    total = made(logits[:, :-1], shifted)
    torch.testing.assert_close(total / shifted.numel(), next_token_loss(logits, labels))


def test_what_is_known_without_torch_is_what_there_is() -> None:
    assert {name: task.has_classes for name, task in TASKS.items()} == HAS_CLASSES


@pytest.mark.parametrize("task", TASKS)
def test_drawn_labels_are_what_the_loss_takes(task: str) -> None:
    chosen = TASKS[task]
    extents = {"batch": 40, "seq": 6}
    shape = [extents[str(d)] for d in chosen.labels_shape]

    def draw() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return chosen.draw_labels(shape, num_classes=3, vocabulary=11, generator=generator)

    labels = draw()
    wanted = 3 if chosen.has_classes else 11
    assert labels.dtype == torch.int64
    assert (labels.min(), labels.max()) == (0, wanted - 1)
    assert torch.equal(labels, draw())
    assert chosen.loss(torch.randn(*shape, wanted), labels).isfinite()
