from types import SimpleNamespace

import numpy as np
import pytest

from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.training.evaluation import evaluate


class Answers:
    """A stack that always answers class 2, at a loss of its batch's size."""

    def __init__(self, task):
        self.artifact = SimpleNamespace(manifest=SimpleNamespace(task=task, label_name="labels"))

    def rows(self, size, tokens, memory):
        return None

    def evaluate(self, batch, adapter, *, rows):
        labels = batch["labels"]
        return float(len(labels)), np.full(labels.shape, 2)


def measured(task, labels, batch_size):
    labels = np.array(labels, np.int64)
    lengths = np.ones(len(labels), np.int64)
    dataset = make_dataset({"labels": Dense(labels)}, lengths, seq_len=8, num_classes=4)
    return evaluate(Answers(task), dataset, {}, batch_size=batch_size)


def test_a_short_batch_weighs_by_its_samples():
    """Batches of 2 and 1, losses 2 and 1: (2 * 2 + 1 * 1) / 3; two of three labels are 2."""
    assert measured("sequence-classification", [2, 0, 2], 2) == (
        pytest.approx(5 / 3),
        pytest.approx(2 / 3),
        3,
    )


def test_ignored_positions_do_not_count():
    """Row 0 has one label, row 1 three: losses 1 and 1, two of four right."""
    rows = [[2, -100, -100], [0, 2, 1]]
    assert measured("token-classification", rows, 1) == (1.0, 0.5, 2)


def test_a_language_model_is_asked_for_the_next_token():
    """The first token is nobody's answer: of 2, 2 | 3 and the padding, two count in row 0 and one in row 1."""
    rows = [[3, 2, 2, -100], [2, 3, -100, -100]]
    loss, accuracy, num_samples = measured("causal-lm", rows, 2)
    assert (loss, accuracy, num_samples) == (2.0, pytest.approx(2 / 3), 2)
