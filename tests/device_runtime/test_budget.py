import pytest
from pretrained import minilm_artifact

from device_runtime.artifact import open_artifact
from device_runtime.budget import MARGIN, must_recompute, resident_mb
from device_runtime.errors import ConfigError
from device_runtime.inspection import estimate
from device_runtime.plans import dropping
from device_runtime.wire import LocalWork, PolicySpec

SIZES = {"batch_size": 16, "seq_len": 64}


@pytest.fixture(scope="module")
def artifact():
    return open_artifact(minilm_artifact(77), verify=False)


def peak(artifact, dropped=(), *, recompute):
    return estimate(artifact, dropping(6, dropped), name="", recompute=recompute, **SIZES).peak_mb * MARGIN


def needs(artifact, budget_mb, policy=None):
    work = LocalWork(batch_size=16, policy=policy or PolicySpec())
    return must_recompute(artifact, work, num_tokens=64, budget_mb=budget_mb)


def test_saving_while_it_fits_then_recompute_then_refusal(artifact):
    saving, recomputing = (peak(artifact, recompute=r) for r in (False, True))
    assert saving > recomputing
    assert needs(artifact, saving) is False
    assert needs(artifact, saving - 1) is True
    assert needs(artifact, recomputing) is True
    with pytest.raises(
        ConfigError, match=r"6 layers at batch size 16 and 64 tokens may take .* with recompute"
    ):
        needs(artifact, recomputing - 1)


def test_a_policy_counts_with_its_deepest_plan(artifact):
    """exact-k at one half never runs more than three layers; Bernoulli at one half does run all six now and then."""
    half = peak(artifact, (0, 1, 2), recompute=False)
    assert needs(artifact, half, PolicySpec(name="exact-k", drop=0.5)) is False
    assert needs(artifact, half, PolicySpec(name="bernoulli", drop=0.5)) is True


def test_what_the_process_holds_already_counts(artifact):
    saving = peak(artifact, recompute=False)
    work = LocalWork(batch_size=16)
    assert must_recompute(artifact, work, num_tokens=64, budget_mb=saving, resident_mb=79) is True
    assert must_recompute(artifact, work, num_tokens=64, budget_mb=saving, resident_mb=20) is False


def test_this_process_holds_something():
    assert 20 < resident_mb() < 100_000
