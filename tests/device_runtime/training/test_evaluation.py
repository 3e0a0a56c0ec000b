from types import SimpleNamespace

import numpy as np
import pytest

from fleetune.device_runtime.contracts.manifest import Targets
from fleetune.device_runtime.data.samples import Dense, make_dataset
from fleetune.device_runtime.training.evaluation import evaluate


class Answers:
    """A stack that always answers class 2, at a loss of its batch's size."""

    def __init__(self, counted):
        self.artifact = SimpleNamespace(
            manifest=SimpleNamespace(counted=counted, label_name="labels", problem_type="")
        )

    def rows(self, size, tokens, memory):
        return None

    def evaluate(self, batch, adapter, *, rows):
        labels = batch["labels"]
        return float(len(labels)), np.full(labels.shape, 2)


LABELLED, NEXT = Targets(shift=0, ignored=-100), Targets(shift=1, ignored=-100)


def measured(counted, labels, batch_size, **more):
    labels = np.array(labels, np.int64)
    lengths = np.ones(len(labels), np.int64)
    dataset = make_dataset({"labels": Dense(labels)}, lengths, seq_len=8, num_classes=4)
    return evaluate(Answers(counted), dataset, {}, batch_size=batch_size, **more)


@pytest.mark.parametrize("counted", [None, LABELLED])
def test_a_short_batch_weighs_by_its_samples(counted):
    """Batches of 2 and 1, losses 2 and 1: (2 * 2 + 1 * 1) / 3; two of three labels are 2."""
    assert measured(counted, [2, 0, 2], 2) == (
        pytest.approx(5 / 3),
        pytest.approx(2 / 3),
        3,
    )


def test_ignored_positions_do_not_count():
    """Row 0 has one label, row 1 three: losses 1 and 1, two of four right."""
    rows = [[2, -100, -100], [0, 2, 1]]
    assert measured(LABELLED, rows, 1) == (1.0, 0.5, 2)


def test_a_batch_weighs_by_its_labels_that_count():
    """Batches of two rows and of one, losses 2 and 1, with four and one labels: (4 * 2 + 1 * 1) / 5."""
    rows = [[2, 2, 0], [2, -100, -100], [0, -100, -100]]
    assert measured(LABELLED, rows, 2) == (pytest.approx(9 / 5), pytest.approx(3 / 5), 3)
    assert measured(None, rows, 2).loss == pytest.approx((2 * 2 + 1 * 1) / 3)  # a mean over rows


def test_a_batch_without_a_label_counts_for_nothing():
    assert measured(LABELLED, [[-100, -100], [2, 0]], 1) == (1.0, 0.5, 2)
    assert measured(LABELLED, [[-100], [-100]], 1) == (0.0, 0.0, 2)


def test_a_language_model_is_asked_for_the_next_token():
    """The first token is nobody's answer: of 2, 2 | 3 and the padding, two count in row 0 and one in row 1."""
    rows = [[3, 2, 2, -100], [2, 3, -100, -100]]
    loss, accuracy, num_samples = measured(NEXT, rows, 2)
    assert (loss, accuracy, num_samples) == (2.0, pytest.approx(2 / 3), 2)


def test_who_counts_by_class_sees_the_labels_that_count_alone():
    rows, seen = [[3, 2, 2, -100], [2, 3, -100, -100]], []
    measured(
        NEXT, rows, 2, on_answers=lambda answers, labels: seen.append((answers.tolist(), labels.tolist()))
    )
    assert seen == [([2, 2, 2], [2, 2, 3])]
    seen.clear()
    measured(
        None, [1, 2], 2, on_answers=lambda answers, labels: seen.append((answers.tolist(), labels.tolist()))
    )
    assert seen == [([2, 2], [1, 2])]
