"""Keys of tasks: what was done before the bound in tokens there was is found again."""

from hashlib import sha256

import msgspec
import pytest

from fleetune.device_runtime.contracts.memory_plan import SAVE_ALL, MemoryPlan
from fleetune.device_runtime.contracts.work import LocalWork, PolicySpec
from fleetune.toolkit.simulation.jobs import Share, Task, told_work

WORK = LocalWork(policy=PolicySpec(name="suffix", drop=0.5), steps=3, held_out=0.1)


def task(work=WORK, memory=SAVE_ALL):
    share = Share(path="train.csv", rows=b"\0\1\0\0")
    return Task(
        kind="train", device="d", share=share, work=work, adapter=b"\1\2", files={"a": b"\3"}, memory=memory
    )


@pytest.mark.parametrize("memory", [SAVE_ALL, MemoryPlan(2, None, True)])
def test_without_a_bound_in_tokens_a_task_has_the_key_that_journals_know(memory):
    """Structs and a plan without the fields that are newer, packed as they were."""
    told = msgspec.to_builtins(task(memory=memory), builtin_types=(bytes,))
    for name in ("micro_tokens", "sample_clip", "sample_noise", "sample_rate", "class_weights"):
        del told["work"][name]
    del told["secret"], told["share"]["columns"]
    told["memory"] = tuple(memory)[:3]
    packed = msgspec.msgpack.Encoder(order="sorted").encode(told)
    assert task(memory=memory).key == sha256(packed).hexdigest()


def test_a_bound_in_tokens_makes_another_task():
    bounded = msgspec.structs.replace(WORK, micro_tokens=64)
    found = {
        task(work, memory).key
        for work in (WORK, bounded)
        for memory in (SAVE_ALL, MemoryPlan(micro_tokens=64))
    }
    assert len(found) == 4
    assert "micro_tokens" not in told_work(WORK)
    assert told_work(bounded) == told_work(WORK) | {"micro_tokens": 64}
