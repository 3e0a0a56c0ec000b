"""The expected memory and arithmetic of a step, against what follows from the shapes by hand."""

import dataclasses

import pytest
from msgspec.structs import replace
from paths import DATA

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.manifest import Kind, extent
from fleetune.device_runtime.contracts.memory_plan import RECOMPUTE, SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.plans import Mode, dropping, full
from fleetune.device_runtime.engine.footprint import (
    footprint,
    forward_flop,
    holds_whole_models,
    largest_footprint,
)
from fleetune.device_runtime.errors import ConfigError

BATCH, SEQ, WIDTH, RANK = 3, 10, 16, 4
HIDDEN = 4 * BATCH * SEQ * WIDTH
"""Bytes of the hidden stream."""


@pytest.fixture(scope="module")
def artifact(word_artifact):
    return open_artifact(word_artifact)


def expected(artifact, plan, memory=SAVE_ALL, *, batch=BATCH, lanes=1):
    return footprint(artifact, plan, batch_size=batch, seq_len=SEQ, memory=memory, lanes=lanes)


def saved_of_a_layer(artifact, batch=BATCH):
    ports = artifact.manifest.kinds[0].graphs["forward_save"].outputs
    elements = 0
    for port in ports:
        if port.role == "saved":
            count = 1
            for e in port.shape:
                count *= extent(e, batch=batch, seq=SEQ)
            elements += count
    return 4 * elements


def test_the_way_back_keeps_each_layers_input_and_what_it_saves(artifact):
    saved = saved_of_a_layer(artifact)
    assert saved > HIDDEN
    assert expected(artifact, full(4)).saved == 4 * (HIDDEN + saved)
    assert expected(artifact, full(4), RECOMPUTE).saved == 4 * HIDDEN
    assert expected(artifact, full(4), MemoryPlan(saved_layers=1)).saved == 4 * HIDDEN + saved
    assert expected(artifact, dropping(4, (0, 2))).saved == 2 * (HIDDEN + saved)
    suffix = (Mode.FORWARD, Mode.FORWARD, Mode.TRAIN, Mode.FORWARD)
    assert expected(artifact, suffix).saved == 2 * (HIDDEN + saved)


def test_a_micro_batch_counts_for_the_batch(artifact):
    assert (
        expected(artifact, full(4), MemoryPlan(1), batch=8).saved
        == expected(artifact, full(4), batch=1).saved
    )
    assert expected(artifact, full(4), MemoryPlan(100)) == expected(artifact, full(4))


def test_as_many_rows_count_as_have_room_in_a_bound_of_tokens(artifact):
    assert (
        expected(artifact, full(4), MemoryPlan(micro_tokens=29), batch=8)
        == expected(artifact, full(4), batch=2)
        != expected(artifact, full(4), batch=8)
    )
    assert expected(artifact, full(4), MemoryPlan(micro_tokens=3), batch=8).saved == saved_by(artifact, 1)
    both = MemoryPlan(micro_batch=1, micro_tokens=29)
    assert expected(artifact, full(4), both, batch=8).saved == saved_by(artifact, 1)


def saved_by(artifact, batch):
    return expected(artifact, full(4), batch=batch).saved


def test_of_a_bound_in_tokens_narrower_rows_may_take_more(artifact):
    """One row of 10 tokens, or two of 7, have room in 15."""
    bound = {"batch_size": 8, "memory": MemoryPlan(micro_tokens=15)}
    widest, narrower = (footprint(artifact, full(4), seq_len=n, **bound) for n in (10, 7))
    assert narrower.peak > widest.peak
    assert largest_footprint(artifact, full(4), seq_len=10, **bound) == narrower
    most = max(footprint(artifact, full(4), seq_len=n, **bound).saved for n in range(1, 11))
    assert narrower.saved >= most * 14 / 15  # three rows of 5 take a token more
    assert largest_footprint(artifact, full(4), batch_size=8, seq_len=10) == expected(
        artifact, full(4), batch=8
    )


def test_frozen_weights_are_those_of_the_layers_that_run(artifact):
    rows = artifact.manifest.tensors
    layer = [sum(t.size_bytes for t in rows if t.layer == i and not t.trainable) for i in range(4)]
    table = sum(t.size_bytes for t in rows if t.layer == -1 and not t.trainable)
    assert expected(artifact, full(4)).weights == table + sum(layer)
    assert expected(artifact, dropping(4, (1, 2))).weights == table + layer[0] + layer[3]
    streamed = MemoryPlan(streamed=True)
    assert expected(artifact, full(4), streamed).weights == max(table, *layer)
    assert expected(artifact, full(4), streamed, lanes=2).weights == 2 * max(table, *layer)


def test_what_other_steps_read_stays_unless_it_is_streamed(artifact):
    half, sizes = dropping(4, (1, 3)), {"batch_size": BATCH, "seq_len": SEQ}
    alone, whole = expected(artifact, half), expected(artifact, full(4))
    every = footprint(artifact, half, also_read=range(4), **sizes)
    assert every.weights == whole.weights > alone.weights
    assert every.peak - alone.peak == every.weights - alone.weights
    streamed = MemoryPlan(streamed=True)
    assert footprint(artifact, half, memory=streamed, also_read=range(4), **sizes) == expected(
        artifact, half, streamed
    )


def test_a_forward_takes_two_operations_a_weight_and_token_and_its_attention(artifact):
    tokens = BATCH * SEQ
    matrices = WIDTH * 3 * WIDTH + 2 * WIDTH * RANK  # qkv, down and up
    attention = 4 * BATCH * SEQ**2 * WIDTH
    for plan, active in ((full(4), 4), (dropping(4, (0,)), 3)):
        found = forward_flop(artifact, plan, batch_size=BATCH, seq_len=SEQ)
        assert found == active * (2 * tokens * matrices + attention)


def test_whole_models_are_not_estimated(artifact):
    assert not holds_whole_models(artifact.manifest)
    whole = dataclasses.replace(artifact, manifest=replace(artifact.manifest, kinds=(Kind({}),)))
    with pytest.raises(ConfigError, match="the memory of its models cannot be estimated"):
        expected(whole, full(4))


def packed(manifest, slots, rows, width):
    """The manifest with the first frozen matrix of some slots as int4 (rows, width / 32, 16)."""
    first = next(
        i for i in slots if not manifest.tensors[i].trainable and len(manifest.tensors[i].shape) == 2
    )
    tensors = list(manifest.tensors)
    tensors[first] = replace(tensors[first], dtype="uint8", shape=(rows, width // 32, 16))
    return replace(manifest, tensors=tuple(tensors))


def grown(artifact, slots, rows, width, **sizes):
    """Bytes that the peak grows by beyond the matrix itself, streamed."""
    peaks = []
    for manifest in (artifact.manifest, packed(artifact.manifest, slots, rows, width)):
        changed = dataclasses.replace(artifact, manifest=manifest)
        found = footprint(changed, full(manifest.num_layers), memory=MemoryPlan(streamed=True), **sizes)
        peaks.append(found.peak - found.weights)
    return peaks[1] - peaks[0]


def test_a_packed_matrix_counts_as_far_as_it_is_unpacked(artifact):
    slots = artifact.manifest.layers[0].tensors
    sizes = {"batch_size": 64, "seq_len": 64}  # the blocks' values are more than the head's
    assert grown(artifact, slots, 64, 64, **sizes) == 4 * 4 * 64 * 64
    assert (
        grown(artifact, slots, 2**12, 2**11, **sizes) == 4 * 2**24
    )  # of 2**25 bytes half is there at a time


def test_a_packed_head_counts_beside_its_logits():
    chat = open_artifact(DATA / "chat_artifact")
    m = chat.manifest
    sizes = {"batch_size": 1, "seq_len": 4}
    logits = 4 * 4 * m.num_logits
    assert grown(chat, m.head.tensors, 2**12, 2**11, **sizes) == logits + 5 * 2**24
