import numpy as np
import pytest

from fleetune.device_runtime.contracts.lora import (
    Pair,
    cut,
    drawn_rows,
    frozen_names,
    lora_problems,
    pairs_of,
    rank_of,
    restored,
    trained_part,
    truncated,
)
from fleetune.device_runtime.contracts.manifest import Tensor
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.draws import Key, permutation

MODULE = "base_model.model.layer.0.query"
PAIR = Pair(f"{MODULE}.lora_A.weight", f"{MODULE}.lora_B.weight")
EMBEDDING = Pair("m.embed.lora_embedding_A", "m.embed.lora_embedding_B")
OTHERS = {
    f"{MODULE}.lora_magnitude_vector": np.ones(5, np.float32),
    f"{MODULE}.lora_B.bias": np.ones(5, np.float32),
    "head.scale": np.array(2.0, np.float32),
}


def adapter(rank=4):
    rng = np.random.default_rng(0)
    shapes = {PAIR.a: (rank, 3), PAIR.b: (5, rank), EMBEDDING.a: (rank, 9), EMBEDDING.b: (2, rank)}
    drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
    return {**drawn, "conv.lora_A.weight": np.ones((rank, 2, 3, 3), np.float32), **OTHERS}


def manifest_of(make_manifest, rank=4, **changes):
    rows = tuple(
        Tensor(name, "adapter", "float32", value.shape, 0, 0, True) for name, value in adapter(rank).items()
    )
    return make_manifest(tensors=rows, **changes)


def test_pairs_are_known_by_their_names():
    assert pairs_of(adapter()) == (PAIR, EMBEDDING)
    assert pairs_of(["blocks.0.down.weight", "lora_A.weight", PAIR.b]) == ()
    assert [rank_of(PAIR, some) for some in (adapter(3), {PAIR.b: np.ones((5, 2))}, {})] == [3, 2, 0]


def test_the_first_components_are_rows_of_a_and_columns_of_b():
    whole = adapter()
    part, zeroed = cut(whole, 2), truncated(whole, 2)
    assert part[PAIR.a].tolist() == whole[PAIR.a][:2].tolist() == zeroed[PAIR.a][:2].tolist()
    assert part[PAIR.b].tolist() == whole[PAIR.b][:, :2].tolist() == zeroed[PAIR.b][:, :2].tolist()
    assert not zeroed[PAIR.a][2:].any()
    assert not zeroed[PAIR.b][:, 2:].any()
    assert part[EMBEDDING.b].shape == (2, 2)
    assert {n: v.shape for n, v in zeroed.items()} == {n: v.shape for n, v in whole.items()}
    for name, value in OTHERS.items():
        assert part[name] is value
        assert zeroed[name] is value


def test_what_is_cut_multiplies_to_what_is_zeroed():
    part, zeroed = cut(adapter(), 3), truncated(adapter(), 3)
    assert np.allclose(part[PAIR.b] @ part[PAIR.a], zeroed[PAIR.b] @ zeroed[PAIR.a])


def test_rank_0_is_all_of_it_and_nothing_is_written_to():
    whole = adapter()
    assert cut(whole, 0) == whole == truncated(whole, 0)
    truncated(whole, 1)
    assert all(np.array_equal(whole[name], value) for name, value in adapter().items())


def test_the_a_of_an_embedding_begins_with_zeros_and_is_never_frozen():
    frozen = LocalWork(frozen="lora-a")
    assert frozen_names(adapter(), frozen) == {PAIR.a}
    assert frozen_names(adapter(), LocalWork()) == frozenset()
    part = trained_part(adapter(), LocalWork(frozen="lora-a", rank=1))
    assert part.keys() == adapter().keys() - {PAIR.a}
    assert part[PAIR.b].shape == (5, 1)


def test_drawn_rows_are_the_first_of_a_permutation_by_seed_round_and_name():
    """As docs/draws.md says, with the CRC-32 of the A's name worked out elsewhere."""
    work = LocalWork(rows=2, rows_seed=7, rounds_before=3)
    key = Key(7, "rows", 3, 0xFFF9533A)
    wanted = sorted(permutation(key, 4)[:2].tolist())
    drawn = drawn_rows(adapter(), work)
    assert drawn[PAIR.a].tolist() == drawn[PAIR.b].tolist() == wanted
    assert drawn.keys() == {*PAIR, *EMBEDDING}, "no row of a tensor that is in no pair"


def test_every_round_and_module_draws_its_own_rows_and_every_device_the_same():
    works = [LocalWork(rows=2, rows_seed=1, rounds_before=r) for r in range(40)]
    drawn = [tuple(drawn_rows(adapter(), work)[PAIR.a]) for work in works]
    assert len(set(drawn)) == 6, "each pair of the four comes up"
    others = [tuple(drawn_rows(adapter(), work)[EMBEDDING.a]) for work in works]
    assert drawn != others
    again = [LocalWork(rows=2, rows_seed=1, rounds_before=r, seed=99) for r in range(40)]
    assert [tuple(drawn_rows(adapter(), work)[PAIR.a]) for work in again] == drawn


def test_of_drawn_rows_a_and_b_travel_and_what_is_in_no_pair_whole():
    whole, work = adapter(), LocalWork(rows=2, rows_seed=7)
    part, rows = trained_part(whole, work), drawn_rows(whole, work)
    assert part[PAIR.a].tolist() == whole[PAIR.a][rows[PAIR.a]].tolist()
    assert part[PAIR.b].tolist() == whole[PAIR.b][:, rows[PAIR.b]].tolist()
    assert all(part[name] is value for name, value in OTHERS.items())
    assert part["conv.lora_A.weight"] is whole["conv.lora_A.weight"]
    frozen = trained_part(whole, LocalWork(rows=2, rows_seed=7, frozen="lora-a"))
    assert frozen.keys() == whole.keys() - {PAIR.a}
    assert frozen[PAIR.b].tolist() == part[PAIR.b].tolist()


def test_rows_of_a_rank_are_of_its_first_components():
    for rounds_before in range(20):
        rows = drawn_rows(adapter(8), LocalWork(rows=1, rank=3, rounds_before=rounds_before))
        assert rows[PAIR.a][0] < 3
    assert drawn_rows(adapter(), LocalWork(rows=4)) == {}, "all learn"
    assert trained_part(adapter(8), LocalWork(rows=2, rank=3))[PAIR.b].shape == (5, 2)


def test_what_is_not_drawn_is_as_it_was():
    before, after = adapter(), {name: value + 1 for name, value in adapter().items()}
    rows = {PAIR.a: np.array([1, 3]), PAIR.b: np.array([0])}
    found = restored(after, before, rows)
    assert found[PAIR.a][[1, 3]].tolist() == after[PAIR.a][[1, 3]].tolist()
    assert found[PAIR.a][[0, 2]].tolist() == before[PAIR.a][[0, 2]].tolist()
    assert found[PAIR.b][:, 1:].tolist() == before[PAIR.b][:, 1:].tolist()
    assert found["head.scale"] is after["head.scale"]
    assert (after[PAIR.a] == adapter()[PAIR.a] + 1).all(), "nothing is written to"


@pytest.mark.parametrize(
    ("work", "said"),
    [
        (LocalWork(), []),
        (LocalWork(rows=5), ["rows 5: the artifact's LoRA has rank 4"]),
        (LocalWork(rank=4), []),
        (LocalWork(rank=5), ["rank 5: the artifact's LoRA has rank 4"]),
    ],
)
def test_a_rank_is_at_most_the_artifact_s(make_manifest, work, said):
    assert lora_problems(work, manifest_of(make_manifest)) == said


def test_an_artifact_without_pairs_is_named(make_manifest):
    found = lora_problems(LocalWork(frozen="lora-a", rank=1), make_manifest())
    assert found == [
        "frozen 'lora-a': the artifact has no LoRA pairs (lora_A with lora_B)",
        "rank 1: the artifact has no LoRA pairs (lora_A with lora_B)",
    ]
    stacked = manifest_of(make_manifest, peft={"target_parameters": ["experts.down_proj"]})
    assert "hold several matrices each" in lora_problems(LocalWork(rank=1), stacked)[0]
