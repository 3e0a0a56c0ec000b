"""Norms of single rows, against steps of one row."""

import numpy as np
import pytest
from tiny import draw_batch, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL
from fleetune.device_runtime.contracts.plans import frozen, full
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.pulls import Pulls, joined, pulls_of

ROWS = 4


@pytest.fixture(scope="module")
def engine(word_artifact):
    with open_engine(open_artifact(word_artifact), threads=1) as found:
        yield found


@pytest.mark.parametrize("together", [SAVE_ALL, SAVE_ALL._replace(micro_tokens=8)])
def test_each_row_pulls_as_it_would_alone_over_their_number(engine, together):
    manifest = engine.artifact.manifest
    batch, adapter, plan = (
        draw_batch(manifest, ROWS, 8),
        noisy_adapter(engine.artifact),
        full(manifest.num_layers),
    )
    found = engine.step(batch, plan, adapter, rows=engine.rows(ROWS, 8, together)).pulls
    alone = [engine.step({n: a[[i]] for n, a in batch.items()}, plan, adapter).pulls for i in range(ROWS)]
    np.testing.assert_allclose(found.body, [one.body[0] / ROWS for one in alone], rtol=1e-4)
    np.testing.assert_allclose(found.head, [one.head[0] / ROWS for one in alone], rtol=1e-4)
    assert len({*found.body.round(6)}) == ROWS


def test_where_no_layer_learns_the_logits_tell(engine):
    manifest = engine.artifact.manifest
    found = engine.step(
        draw_batch(manifest, ROWS, 8), frozen(manifest.num_layers), engine.artifact.adapter()
    ).pulls
    assert found.body.tolist() == found.head.tolist()
    assert found.head.min() > 0


def test_a_row_that_is_judged_right_beyond_doubt_does_not_pull():
    found = pulls_of(np.array([[0.0, 800.0], [0.0, 0.0]], np.float32), np.array([1, 0]), None)
    assert found.head.tolist() == [0.0, pytest.approx(np.sqrt(0.5) / 2)]


def test_parts_of_which_one_is_not_measured_are_not_measured():
    one = Pulls(np.ones(2), np.ones(2))
    assert joined([one, None], [0.5, 0.5]) is None
    assert joined([one, one], [0.5, 0.25]).body.tolist() == [0.5, 0.5, 0.25, 0.25]
    assert pulls_of(None, np.zeros((2, 3), int), None) is None


def test_however_small_a_gradient_is_it_is_measured():
    found = pulls_of(None, np.zeros(2, int), np.full((2, 3, 4), 1e-30, np.float32))
    assert found.body == pytest.approx([np.sqrt(12) * 1e-30] * 2)
