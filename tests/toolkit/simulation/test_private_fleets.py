"""Simulated fleets with differential privacy: what is counted, and that noise can be repeated here though nowhere else."""

import pytest
from simulated import outcome, records, run, write_config

DP = ("job.dp.clip=0.1", "job.dp.noise=2.0", "job.dp.most_epsilon=4.0")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_config(tmp_path_factory.mktemp("private"))


@pytest.mark.parametrize("name", ["central", "local"])
def test_a_seed_gives_the_same_bits_and_the_budget_is_counted(path, name):
    for again in ("once", "twice"):
        run(path, f"{name}-{again}", f"job.dp.name={name}", *DP)
    assert outcome(path.parent / f"{name}-once") == outcome(path.parent / f"{name}-twice")
    spent = [line["epsilon"] for line in records(path.parent / f"{name}-once")]
    assert spent[0] == 0
    assert spent[1] == pytest.approx(1.991, abs=0.01)
    assert spent == sorted(spent)
    assert spent[-1] <= 4.0


def test_noise_is_in_the_outcome(path):
    run(path, "none")
    run(path, "noisy", "job.dp.name=central", *DP)
    without, with_noise = (records(path.parent / name) for name in ("none", "noisy"))
    assert without[-1]["epsilon"] is None
    assert without[-1]["loss"] != with_noise[-1]["loss"]


def test_devices_that_hide_samples_give_the_same_bits_again_and_the_steps_are_counted(path):
    dp = ("job.dp.clip=1.0", "job.dp.noise=1.5", "job.dp.sample_rate=0.2")
    for again in ("once", "twice"):
        run(path, f"sample-{again}", "job.dp.name=sample", *dp)
    assert outcome(path.parent / "sample-once") == outcome(path.parent / "sample-twice")
    spent = [line["epsilon"] for line in records(path.parent / "sample-once")]
    assert spent[0] == 0
    assert 0 < spent[1] <= spent[-1]
    run(path, "sample-less", "job.dp.name=sample", *dp, "job.dp.noise=0.001")
    less, more = (records(path.parent / name)[-1]["loss"] for name in ("sample-less", "sample-once"))
    assert less != more
