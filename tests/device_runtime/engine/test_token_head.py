"""A linear head worked out by hand: whole, in chunks, and with targets left out."""

import weakref

import numpy as np
import pytest

from fleetune.device_runtime.contracts.manifest import Targets
from fleetune.device_runtime.engine.token_head import HeadResult, chunks, run_tokens, shifted

IGNORED, CLASSES, WIDTH = -100, 11, 4
TARGETS = Targets(shift=1, ignored=IGNORED)
RNG = np.random.default_rng(0)
HIDDEN = RNG.normal(size=(3, 6, WIDTH)).astype(np.float32)
WEIGHT = RNG.normal(size=(WIDTH, CLASSES)).astype(np.float32)
LABELS = RNG.integers(0, CLASSES, (3, 6))
LABELS[1, 3:] = IGNORED
LABELS[2] = IGNORED


def linear(hidden, targets):
    logits = hidden @ WEIGHT
    p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    counted = targets != IGNORED
    right = np.eye(CLASSES, dtype=np.float32)[np.where(counted, targets, 0)]
    slope = (p - right) * counted[..., None]
    loss = -(np.log((p * right).sum(-1)) * counted).sum()
    weight = np.einsum("bsh,bsc->hc", hidden, slope)
    return float(loss), {"logits": logits, "d_hidden": slope @ WEIGHT.T, "w": weight}


def run(labels=LABELS, **settings) -> HeadResult:
    return run_tokens(linear, HIDDEN, labels, targets=TARGETS, num_classes=CLASSES, **settings)


def test_labels_move_to_the_token_that_is_asked():
    assert shifted(np.array([[1, 2, 3], [4, IGNORED, IGNORED]]), TARGETS).tolist() == [
        [2, 3, IGNORED],
        [IGNORED, IGNORED, IGNORED],
    ]


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("keep_logits", [False, True])
def test_chunks_give_what_the_whole_gives(rows, keep_logits):
    targets = shifted(LABELS, TARGETS)
    count = (targets != IGNORED).sum()
    loss, found = linear(HIDDEN, targets)
    result = run(keep_logits=keep_logits, logits_bytes=4 * CLASSES * rows)
    assert result.loss == pytest.approx(loss / count, rel=1e-6)
    np.testing.assert_allclose(result.d_hidden, found["d_hidden"] / count, atol=1e-6)
    np.testing.assert_allclose(result.grads["w"], found["w"] / count, atol=1e-6)
    asked = targets != IGNORED
    assert (result.answers == found["logits"].argmax(-1))[asked].all()
    if keep_logits:
        np.testing.assert_allclose(result.logits, found["logits"], atol=1e-6)
    else:
        assert result.logits is None


def test_only_tokens_with_a_target_are_run():
    seen = []
    run_tokens(
        lambda h, t: (seen.append(t.shape[1]), linear(h, t))[1],
        HIDDEN,
        LABELS,
        targets=TARGETS,
        num_classes=CLASSES,
        logits_bytes=4 * CLASSES * 4,
    )
    assert seen == [4, 3]  # five targets of row 0, two of row 1, none of row 2


def test_a_batch_without_targets_has_no_loss_and_zero_gradients():
    result = run(np.full_like(LABELS, IGNORED))
    assert result.loss == 0
    assert not result.d_hidden.any()
    assert not result.grads["w"].any()


def test_a_row_of_logits_larger_than_the_bound_is_still_run():
    assert [c.tolist() for c in chunks(np.arange(3), 1 << 30)] == [[0], [1], [2]]


def test_nothing_of_a_chunk_is_held_while_the_next_runs():
    seen = []

    def run(hidden, targets):
        assert not [ref for ref in seen if ref() is not None]
        logits = np.zeros((1, targets.shape[1], CLASSES), np.float32)
        slope, gained = np.zeros_like(hidden), np.ones(CLASSES, np.float32)
        seen.extend(map(weakref.ref, (logits, slope, gained)))
        return 1.0, {"logits": logits, "d_hidden": slope, "w": gained}

    labels = np.ones((2, 6), np.int64)
    found = run_tokens(
        run,
        np.zeros((2, 6, 3), np.float32),
        labels,
        targets=Targets(shift=0, ignored=-100),
        num_classes=CLASSES,
        logits_bytes=3 * 4 * CLASSES,
    )
    assert len(seen) == 12
    assert found.loss == pytest.approx(4 / 12)
