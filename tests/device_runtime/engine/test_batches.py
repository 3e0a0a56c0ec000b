"""A batch checked, cut into what runs together, and the mean of its parts put together again."""

import numpy as np
import pytest

from fleetune.device_runtime.contracts.manifest import Input, Targets
from fleetune.device_runtime.contracts.memory_plan import MemoryPlan
from fleetune.device_runtime.engine.batches import (
    Mean,
    StepResult,
    check_batch,
    num_rows,
    num_tokens,
    parts,
    share_of,
)
from fleetune.device_runtime.engine.lanes import Rows
from fleetune.device_runtime.errors import ArtifactError

INPUTS = (
    Input("ids", "int64", ("batch", "seq")),
    Input("scale", "float32", (2,)),
    Input("labels", "int64", ("batch",), role="labels"),
)


def batch(rows: int, seq: int = 3) -> dict:
    return {
        "ids": np.arange(rows * seq).reshape(rows, seq),
        "scale": np.ones(2, np.float32),
        "labels": np.arange(rows),
    }


@pytest.mark.parametrize(
    ("size", "rows", "expected"),
    [
        (5, Rows(1), [[5]]),
        (5, Rows(2), [[3, 2]]),
        (5, Rows(1, MemoryPlan(2)), [[2], [2], [1]]),
        (7, Rows(2, MemoryPlan(4)), [[2, 2], [2, 1]]),
        (5, Rows(2, MemoryPlan(4)), [[2, 2], [1]]),
        (2, Rows(4), [[1, 1]]),
        (3, Rows(1, MemoryPlan(100)), [[3]]),
        (16, Rows(1, MemoryPlan(9)), [[8], [8]]),
        (16, Rows(1, MemoryPlan(micro_tokens=29)), [[8], [8]]),
        (10, Rows(4, MemoryPlan(8)), [[2, 2, 2, 2], [1, 1]]),
        (5, Rows(1, MemoryPlan(micro_tokens=6)), [[2], [2], [1]]),
        (3, Rows(1, MemoryPlan(micro_tokens=2)), [[1], [1], [1]]),
        (5, Rows(1, MemoryPlan(1, micro_tokens=6)), [[1], [1], [1], [1], [1]]),
        (5, Rows(1, MemoryPlan(4, micro_tokens=6)), [[2], [2], [1]]),
        (8, Rows(2, MemoryPlan(micro_tokens=12)), [[2, 2], [2, 2]]),
        (3, Rows(1, MemoryPlan(micro_tokens=9)), [[3]]),
    ],
)
def test_micro_batches_come_one_after_the_other_and_their_parts_together(size, rows, expected) -> None:
    whole = batch(size)
    made = parts(whole, INPUTS, rows)
    assert [[len(part.arrays["labels"]) for part in group] for group in made] == expected
    flat = [part for group in made for part in group]
    for name in ("ids", "labels"):
        assert np.array_equal(np.concatenate([part.arrays[name] for part in flat]), whole[name])
    assert np.array_equal(np.concatenate([whole["ids"][part.place] for part in flat]), whole["ids"])
    assert all(part.arrays["scale"] is whole["scale"] for part in flat)


def test_rows_that_are_no_sequences_count_as_a_token() -> None:
    bare = tuple(row for row in INPUTS if row.name != "ids")
    assert [len(group) for group in parts(batch(6), bare, Rows(1, MemoryPlan(micro_tokens=2)))] == [1, 1, 1]


def test_a_batch_has_rows_and_tokens() -> None:
    assert (num_rows(batch(4), INPUTS), num_tokens(batch(4, 9), INPUTS)) == (4, 9)
    assert num_tokens({"labels": np.arange(2)}, INPUTS) == 0


def test_every_difference_is_told() -> None:
    wrong = {**batch(2), "ids": np.zeros((3, 4), np.int64), "more": np.zeros(1)}
    del wrong["scale"]
    with pytest.raises(
        ArtifactError,
        match=r"more: not an input of this model; scale: missing; labels: expected int64\[batch\], got int64\[2\]",
    ):
        check_batch(wrong, INPUTS, bounds={})


def test_a_bound_is_kept() -> None:
    check_batch(batch(4), INPUTS, bounds={"batch": 4})
    with pytest.raises(ArtifactError, match="batch 5: at most 4"):
        check_batch(batch(5), INPUTS, bounds={"batch": 4})


def test_a_part_weighs_by_its_share() -> None:
    """Two rows of loss 3 and one of loss 6: (2 * 3 + 6) / 3; gradients 1 and 4 on average 2."""
    mean = Mean(3)
    mean.add(StepResult(3.0, np.zeros((2, 5)), {"w": np.full(2, 1, np.float32)}), 2)
    mean.add(StepResult(6.0, np.ones((1, 5)), {"w": np.full(2, 4, np.float32)}), 1)
    found = mean.result()
    assert found.loss == pytest.approx(4.0)
    np.testing.assert_allclose(found.grads["w"], [2, 2], rtol=1e-6)
    assert found.logits.sum(1).tolist() == [0, 0, 5]


def test_one_part_alone_stays_what_it_is() -> None:
    grad = np.array([1 / 3], np.float32)
    mean = Mean(7)
    mean.add(StepResult(0.1, None, {"w": grad}), 7)
    assert mean.result() == (0.1, None, {"w": grad}, None)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_part_without_share_adds_nothing_but_its_logits(order) -> None:
    """The mean over no label is NaN, and so is its gradient."""
    parts = [(StepResult(2.0, np.ones((1, 5)), {"w": np.full(2, 4, np.float32)}), 3)]
    parts += [(StepResult(np.nan, np.zeros((2, 5)), {"w": np.full(2, np.nan, np.float32)}), 0)]
    mean = Mean(3)
    for i in order:
        mean.add(*parts[i])
    found = mean.result()
    assert (found.loss, found.grads["w"].tolist(), len(found.logits)) == (2.0, [4, 4], 3)


def test_nothing_but_parts_without_share_is_a_loss_and_a_gradient_of_0() -> None:
    mean = Mean(0)
    mean.add(StepResult(np.nan, None, {"w": np.full(2, np.nan, np.float32)}), 0)
    assert (mean.result().loss, mean.result().grads["w"].tolist()) == (0.0, [0, 0])


def test_a_share_is_rows_or_the_labels_that_have_a_target() -> None:
    assert share_of(np.array([1, 2, 3]), None) == 3
    assert share_of(np.array([1, -100, 3]), Targets(shift=0, ignored=-100)) == 2
    labels = np.array([[5, 6, -100, -100], [5, 6, 7, 8]])
    assert share_of(labels, None) == 2
    assert share_of(labels, Targets(shift=0, ignored=-100)) == 2 + 4
    assert share_of(labels, Targets(shift=1, ignored=-100)) == 1 + 3
