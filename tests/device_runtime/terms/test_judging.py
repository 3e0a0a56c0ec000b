"""Each limit with what it refuses, and by how much; ordinary work under the defaults."""

from math import inf, nan

import msgspec
import pytest

from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import check
from fleetune.device_runtime.terms.judging import beneath_effective, objections
from fleetune.device_runtime.terms.tensors import counted, may_leave, name_problems
from fleetune.device_runtime.terms.terms import Terms
from fleetune.toolkit.demo import HOUSEHOLD_WORK

QUERY, EMBEDDING = "m.layer.0.query.lora_{}.weight", "m.word_embeddings.lora_embedding_A"
NAMES = (QUERY.format("A"), QUERY.format("B"), EMBEDDING, "m.classifier.weight")


HINT = "a lower --least-effective would allow it, and make texts easier to read out of an update"


def found(work, *, terms=Terms(), role="train", num_samples=100, names=NAMES):
    return [*objections(terms, work, role=role, num_samples=num_samples, names=names)]


@pytest.mark.parametrize(
    "work",
    [
        HOUSEHOLD_WORK,
        LocalWork(),
        LocalWork(epochs=3, batch_size=8),
        LocalWork(steps=100, policy=PolicySpec(name="exact-k", drop=0.5)),
        LocalWork(steps=4, held_out=0.1),
    ],
)
@pytest.mark.parametrize("num_samples", [36, 37, 60, 100, 1001])
def test_ordinary_work_is_allowed(work, num_samples):
    assert found(work, num_samples=num_samples) == []


@pytest.mark.parametrize("codec", ["fp32", "int8", "grid", "Masked", ""])
def test_an_owner_of_secure_sums_alone_allows_masked_training_and_evaluation(codec):
    terms = Terms(secure_only=True)
    assert found(LocalWork(codec=codec), terms=terms) == ["secure_only: the update would not be masked"]
    assert found(LocalWork(codec=codec)) == []
    assert found(LocalWork(codec="masked"), terms=terms) == []
    assert found(LocalWork(codec=codec), terms=terms, role="evaluate") == []
    assert "not be masked" in found(LocalWork(codec="xor", learns="class-means"), terms=terms)[0]


def test_the_offer_that_reads_texts_is_outside_three_limits():
    sgd = LocalWork(steps=1, batch_size=1, optimizer=OptimizerSpec(name="sgd", lr=1.0))
    assert found(sgd) == [
        "least_samples: 1 asked for, 8 at least (7 too few)",
        f"least_effective: 1 asked for, 32 at least (31 too few); {HINT}",
        "least_batch: 1 asked for, 4 at least (3 too few)",
    ]


LIMITS = {
    "least_samples": (101, LocalWork(), "100 asked for, 101 at least (1 too few)"),
    "least_effective": (60, LocalWork(steps=2), "20 asked for, 60 at least (40 too few)"),
    "least_batch": (20, LocalWork(batch_size=16), "16 asked for, 20 at least (4 too few)"),
    "least_steps": (9, LocalWork(steps=7), "7 asked for, 9 at least (2 too few)"),
    "most_steps": (50, LocalWork(steps=2**31 - 1), "2,147,483,647 asked for, 50 at most (2,147,483,597 too many)"),
    "most_batch": (16, LocalWork(batch_size=17), "17 asked for, 16 at most (1 too many)"),
    "most_tokens": (64, LocalWork(seq_len=128), "128 asked for, 64 at most (64 too many)"),
    "policies": ("full, suffix", LocalWork(policy=PolicySpec(name="head")), "asked for head, allowed are full, suffix"),
    "may_leave": ("nothing.*", LocalWork(), "no tensor that this work trains may leave"),
}  # fmt: skip


@pytest.mark.parametrize("limit", LIMITS)
def test_each_limit_refuses_what_is_outside_and_says_by_how_much(limit):
    value, work, said = LIMITS[limit]
    terms = msgspec.structs.replace(Terms(least_batch=1), **{limit: value})
    assert any(one.startswith(f"{limit}: {said}") for one in found(work, terms=terms))
    assert not [one for one in found(work, terms=Terms(least_batch=1)) if "nothing" in one]


@pytest.mark.parametrize("changes", [{"seq_len": -1}, {"steps": 2**64 - 1}, {"batch_size": 0}, {"batch_size": -4},
                                     {"held_out": nan}, {"epochs": -3, "steps": 0}])  # fmt: skip
def test_work_against_its_own_laws_is_outside_whatever_the_owner_allows(changes):
    assert found(msgspec.structs.replace(LocalWork(), **changes))


def test_an_evaluation_needs_samples_and_no_steps():
    assert found(LocalWork(steps=1, batch_size=1), role="evaluate", num_samples=8) == []
    assert found(LocalWork(), role="evaluate", num_samples=7) == [
        "least_samples: 7 asked for, 8 at least (1 too few)"
    ]


def test_class_sums_are_of_the_head():
    sums = LocalWork(learns="class-means", steps=1)
    assert found(sums) == []
    assert found(sums, terms=Terms(must_stay="head"))[0].startswith("may_leave: class sums")


def test_tensors_leave_by_kind_or_by_pattern():
    assert may_leave(Terms(), NAMES) == [*NAMES]
    assert may_leave(Terms(may_leave="head"), NAMES) == [NAMES[3]]
    assert may_leave(Terms(must_stay="embeddings"), NAMES) == [NAMES[0], NAMES[1], NAMES[3]]
    assert may_leave(Terms(may_leave="head, *.lora_B.*", must_stay="m.classifier.*"), NAMES) == [NAMES[1]]
    assert counted(NAMES) == {"embeddings": 1, "head": 1, "lora": 2}


@pytest.mark.parametrize("value", [nan, inf, -1.0, 1e300])
@pytest.mark.parametrize("limit", ["most_change", "most_seconds", "most_bytes_a_day"])
def test_a_limit_that_is_none_is_refused(limit, value):
    with pytest.raises(ConfigError, match=limit):
        check(Terms(**{limit: value}))


def test_an_update_of_few_samples_in_effect_is_outside_whatever_their_number():
    assert [*beneath_effective(Terms(), 31.9)] == [
        f"least_effective: 31 asked for, 32 at least (1 too few); {HINT}"
    ]
    assert not [*beneath_effective(Terms(), 32.0), *beneath_effective(Terms(least_effective=0), 0.0)]


def test_names_that_name_nothing_are_told_with_the_choices():
    terms = Terms(may_leave="heads", policies="full, newton")
    assert [*name_problems(terms, NAMES, ("full", "head"))] == [
        "may_leave 'heads': no tensor is called so; have the kinds embeddings, head, lora, or a pattern as '*.query.*'",
        "no policy 'newton'; have: full, head",
    ]
