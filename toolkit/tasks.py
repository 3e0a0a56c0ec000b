"""What each task means: the model class, how PEFT calls it, its loss, and its labels."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, mse_loss

from fleetune.device_runtime.contracts.manifest import ProblemType, Targets
from fleetune.device_runtime.tables import Table

WITHOUT_TEXT = ("image-classification", "audio-classification")
"""Tasks of models that see images or hear recordings."""
IGNORED = -100
"""A label of this value counts for nothing."""
LABELLED, NEXT = Targets(shift=0, ignored=IGNORED), Targets(shift=1, ignored=IGNORED)


class Task(NamedTuple):
    """``auto_class`` is a class of transformers, ``peft_type`` a TaskType of peft (empty: none fits).

    ``counted`` are the labels that the loss is a mean over; None for all rows. ``token_loss`` is its sum over any tokens, for
    tasks with more classes than their logits should ever be held whole.
    """

    auto_class: str
    peft_type: str
    loss: Callable[[Tensor, Tensor], Tensor]
    labels_shape: tuple[int | str, ...]
    has_classes: bool = True
    counted: Targets | None = LABELLED
    token_loss: Callable[[Tensor, Tensor], Tensor] | None = None
    problem_type: ProblemType = ""

    @property
    def labels_dtype(self) -> str:
        """Of classes int64; numbers, and zeros and ones, are float32."""
        return "float32" if self.problem_type else "int64"

    def draw_labels(
        self, shape: Sequence[int], *, num_classes: int, vocabulary: int, generator: torch.Generator
    ) -> Tensor:
        """Labels of ``shape``: classes, or tokens where the vocabulary is to choose from; numbers; zeros and ones."""
        if self.problem_type == "regression":
            return torch.randn(list(shape), generator=generator)
        if self.problem_type:
            return torch.randint(0, 2, list(shape), generator=generator).float()
        high = num_classes if self.has_classes else vocabulary
        return torch.randint(0, high, list(shape), generator=generator)


def task_of(name: str, config: Any) -> Task:
    """A task as a model's configuration has it: its ``problem_type`` says what is learned, ``num_labels`` of how many outputs."""
    problem, task = getattr(config, "problem_type", None), TASKS[name]
    if problem == "regression":
        shape = ("batch",) if config.num_labels == 1 else ("batch", config.num_labels)
        return task._replace(loss=regression_loss, labels_shape=shape, counted=None, problem_type=problem)
    if problem == "multi_label_classification":
        shape = ("batch", config.num_labels)
        return task._replace(loss=label_set_loss, labels_shape=shape, counted=None, problem_type=problem)
    return task


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labelled rows; logits (batch, classes), labels (batch,)."""
    return cross_entropy(logits, labels)


def regression_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean squared error over rows and outputs; logits (batch, outputs), labels alike, or (batch,) of one output."""
    return mse_loss(logits.reshape(labels.shape), labels)


def label_set_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean binary cross entropy over rows and labels; logits and labels (batch, labels), labels 0 or 1."""
    return binary_cross_entropy_with_logits(logits, labels)


def token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy over the labelled tokens; logits (batch, seq, classes), labels (batch, seq)."""
    return _masked_mean(logits.flatten(0, 1), labels.flatten())


def next_token_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of each token given those before it; logits (batch, seq, vocabulary), labels (batch, seq)."""
    return _masked_mean(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def _masked_mean(logits: Tensor, labels: Tensor) -> Tensor:
    return _masked_sum(logits, labels) / (labels != IGNORED).sum().clamp(min=1)


def _masked_sum(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy over the labels that are not IGNORED, written without indexing so that it traces with any sizes."""
    counted = labels != IGNORED
    chosen = logits.log_softmax(-1).gather(-1, torch.where(counted, labels, 0)[..., None])[..., 0]
    return -(chosen * counted).sum()


class _SummedCrossEntropy(torch.autograd.Function):
    """:func:`_masked_sum` with a gradient that is made in place: of a large vocabulary every copy of the logits counts."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        counted = labels != IGNORED
        places = torch.where(counted, labels, 0)[..., None]
        total = logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, total, places, counted)
        return ((total - logits.gather(-1, places))[..., 0] * counted).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, total, places, counted = ctx.saved_tensors
        slope = (logits - total).exp().scatter_add(-1, places, -torch.ones_like(total))
        return slope * (counted[..., None] * gradients[0]), None


def _summed(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy summed over the labels that are not IGNORED; logits (…, vocabulary), labels (…)."""
    found: Tensor = _SummedCrossEntropy.apply(logits, labels)  # type: ignore[no-untyped-call]
    return found


TASKS = Table(
    "task",
    {
        "sequence-classification": Task(
            "AutoModelForSequenceClassification", "SEQ_CLS", classification_loss, ("batch",)
        ),
        "token-classification": Task(
            "AutoModelForTokenClassification", "TOKEN_CLS", token_loss, ("batch", "seq")
        ),
        "causal-lm": Task(
            "AutoModelForCausalLM",
            "CAUSAL_LM",
            next_token_loss,
            ("batch", "seq"),
            has_classes=False,
            counted=NEXT,
            token_loss=_summed,
        ),
        "image-classification": Task("AutoModelForImageClassification", "", classification_loss, ("batch",)),
        "audio-classification": Task("AutoModelForAudioClassification", "", classification_loss, ("batch",)),
    },
)
