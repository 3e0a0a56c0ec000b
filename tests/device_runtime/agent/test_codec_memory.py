import logging

import numpy as np
import pytest

from fleetune.device_runtime.agent.codec_memory import CodecMemory
from fleetune.device_runtime.arrays import save_arrays
from fleetune.device_runtime.files import DiskFiles

LIKE = {"w": np.zeros(3, np.float32)}


def memory_of(folder, *, job="job", artifact="a" * 64):
    return CodecMemory(DiskFiles(folder), job=job, artifact=artifact)


def owing(value):
    return {"residual/w": np.full(3, float(value))}


def value_of(memory):
    return memory["residual/w"][0] if memory else None


def test_it_is_that_of_the_newest_round_before(tmp_path):
    memory = memory_of(tmp_path)
    assert memory.before(1) == {}
    memory.keep(1, owing(1))
    memory.keep(2, owing(2))
    again = memory_of(tmp_path)
    assert [value_of(again.before(number)) for number in (1, 2, 3, 9)] == [None, 1, 2, 2]


@pytest.mark.parametrize(("accepted", "left"), [(True, 2), (False, 1)])
def test_a_verdict_keeps_one_side_and_voids_what_an_earlier_run_left_behind(tmp_path, accepted, left):
    memory = memory_of(tmp_path)
    for number in (1, 2, 7):
        memory.keep(number, owing(number))
    memory.settle(2, accepted=accepted)
    assert value_of(memory.before(9)) == left


@pytest.mark.parametrize(("accepted", "left"), [(True, [2, 3]), (False, [1, 3])])
def test_a_late_verdict_leaves_later_rounds_of_this_run(tmp_path, accepted, left):
    memory = memory_of(tmp_path)
    for number in (1, 2, 3, 7):
        memory.keep(number, owing(number))
    memory.settle(2, accepted=accepted, newest=3)
    assert [value_of(memory.before(number)) for number in (3, 9)] == left


def test_nothing_owed_takes_the_place_of_something_owed_before(tmp_path):
    memory = memory_of(tmp_path)
    memory.keep(1, owing(1))
    memory.keep(2, {})
    assert memory.before(3) == {}, "the update of round 2 conveyed it, whatever the verdict on it will be"
    memory.settle(2, accepted=False)
    assert value_of(memory.before(3)) == 1


def test_who_never_owed_anything_has_no_file(tmp_path):
    memory_of(tmp_path).keep(1, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("other", [{"job": "another"}, {"artifact": "b" * 64}])
def test_another_job_or_artifact_sees_nothing_of_it_and_leaves_it(tmp_path, other):
    memory_of(tmp_path).keep(1, owing(1))
    stranger = memory_of(tmp_path, **other)
    assert stranger.before(5) == {}
    stranger.settle(1, accepted=False)
    assert value_of(memory_of(tmp_path).before(5)) == 1


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-3], lambda b: b[:-1] + b"\x01", lambda b: b"", lambda b: b"\xff" * 9]
)
def test_a_damaged_file_is_named_and_set_aside_and_the_one_before_taken(tmp_path, caplog, damage):
    memory = memory_of(tmp_path)
    memory.keep(1, owing(1))
    memory.keep(2, owing(2))
    newest = sorted(tmp_path.iterdir())[-1]
    damaged = damage(newest.read_bytes())
    newest.write_bytes(damaged)
    assert value_of(memory.before(3)) == 1
    assert f"{newest.name}: damaged" in caplog.text
    assert newest.with_name(f"{newest.name}.aside").read_bytes() == damaged


def test_a_residual_of_0_1_0_of_this_job_is_taken_over(tmp_path):
    save_arrays(tmp_path / "residual-000003.safetensors", {"w": np.ones(3)})
    memory = memory_of(tmp_path)
    memory.adopt({3}.__contains__, like=LIKE)
    assert value_of(memory.before(4)) == 1
    assert not list(tmp_path.glob("residual-*"))


@pytest.mark.parametrize(
    ("content", "known"),
    [({"w": np.ones(3)}, set()), ({"w": np.ones(4)}, {3}), ({"x": np.ones(3)}, {3}), (None, {3})],
)
def test_a_residual_of_0_1_0_of_another_job_or_model_is_named_and_kept_aside(
    tmp_path, caplog, content, known
):
    old = tmp_path / "residual-000003.safetensors"
    save_arrays(old, content) if content else old.write_bytes(b"torn")
    before = old.read_bytes()
    memory = memory_of(tmp_path)
    with caplog.at_level(logging.WARNING):
        memory.adopt(known.__contains__, like=LIKE)
    assert memory.before(9) == {}
    assert "residual-000003.safetensors: not known to be of job 'job'" in caplog.text
    assert old.with_name("residual-000003.safetensors.aside").read_bytes() == before
