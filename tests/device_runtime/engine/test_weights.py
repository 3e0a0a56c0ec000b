"""Streamed weights stay while a thread runs on them and leave with the last one."""

import pytest
from msgspec.structs import replace

from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.engine.weights import FrozenWeights, StepWeights, stays_through_head


@pytest.fixture
def advice(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the system was told, with the first byte."""
    told: list[tuple[str, int]] = []
    for name in ("fetch", "release", "scatter"):
        monkeypatch.setattr(
            Artifact, name, lambda self, start, end, name=name: told.append((name, start)) or None
        )
    return told


@pytest.fixture
def starts(word_artifact) -> dict[int, int]:
    """First byte of each layer's span."""
    rows = [row for row in open_artifact(word_artifact).manifest.tensors if not row.trainable]
    return {layer: min(r.offset for r in rows if r.layer == layer) for layer in range(4)}


@pytest.fixture
def frozen(word_artifact) -> FrozenWeights:
    return FrozenWeights(open_artifact(word_artifact), lambda array: array)


@pytest.fixture
def weights(frozen, advice) -> StepWeights:
    made = frozen.of_step({}, streamed=True)
    advice.clear()
    return made


def test_a_layer_is_read_ahead_while_the_one_before_runs_and_leaves_after_it(weights, starts, advice) -> None:
    with weights.in_use(0, then=1):
        assert advice == [("fetch", starts[1])]
    assert advice[1:] == [("release", starts[0])]


def test_the_last_of_two_threads_lets_go(weights, starts, advice) -> None:
    one, other = weights.in_use(1, then=2), weights.in_use(1, then=2)
    one.__enter__()
    other.__enter__()
    one.__exit__(None, None, None)
    assert advice == [("fetch", starts[2])]
    other.__exit__(None, None, None)
    assert advice[1:] == [("release", starts[1])]


def test_what_is_needed_next_stays(weights, advice) -> None:
    with weights.in_use(3, stays=True):
        pass
    assert not advice
    with weights.in_use(3):
        pass
    assert len(advice) == 1


def test_it_leaves_after_a_failure_too(weights, starts, advice) -> None:
    with pytest.raises(ValueError, match="no"), weights.in_use(2):
        raise ValueError("no")
    assert advice == [("release", starts[2])]


def test_resident_weights_are_let_be(frozen, advice) -> None:
    with frozen.of_step({}, streamed=False).in_use(0, then=1):
        pass
    assert not advice


def test_the_last_layer_leaves_before_a_head_that_reads_more(word_artifact) -> None:
    m = open_artifact(word_artifact).manifest
    assert stays_through_head(m)
    tied = replace(
        m, head=replace(m.head, tensors=(*m.head.tensors, *(i for layer in m.layers for i in layer.tensors)))
    )
    assert not stays_through_head(tied)
