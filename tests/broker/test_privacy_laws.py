"""What differential privacy can be had with, and what is refused in a line."""

import math

import pytest
from rounds_by_hand import job

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.jobs.settings import differences
from fleetune.broker.jobs.work import device_work
from fleetune.broker.laws import check_settings
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.errors import ConfigError

EVERYWHERE = ("central", "distributed", "local")
ON_DEVICES = ("distributed", "local")


def private(name="central", **changes):
    return Privacy(**{"name": name, "clip": 1.0, "noise": 1.0, **changes})


def said_of(**changes):
    with pytest.raises(ConfigError) as caught:
        check_settings(job(**changes), Patience(), num_layers=4)
    return str(caught.value)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"strategy": "fedavgm"},
        {"work": LocalWork(codec="int8")},
        {"work": LocalWork(codec="topk", codec_ratio=0.1)},
        {"work": LocalWork(held_out=0.1)},
        {"work": LocalWork(frozen="lora-a")},
    ],
)
def test_allowed(name, changes):
    check_settings(job(dp=private(name), **changes), Patience(), num_layers=4)


@pytest.mark.parametrize(
    "changes",
    [
        {"work": LocalWork(personal=1)},
        {"work": LocalWork(codec="innovation", codec_bits=4)},
        {"down_codec": "int8"},
    ],
)
def test_allowed_where_the_aggregator_bounds_what_comes(changes):
    check_settings(job(dp=private(), **changes), Patience(), num_layers=4)
    for name in ON_DEVICES:
        assert f"dp '{name}': " in said_of(dp=private(name), **changes)


@pytest.mark.parametrize("name", EVERYWHERE)
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "product"}, "strategy 'product' uses more of the updates than their mean"),
        ({"strategy": "safari"}, "strategy 'safari' uses more"),
        ({"strategy": "hetlora", "work": LocalWork(rank=2)}, "strategy 'hetlora' uses more"),
        (
            {"configurator": "auto", "work": LocalWork(held_out=0.1)},
            "configurator 'auto' goes by what devices tell",
        ),
        ({"traffic": "bits"}, "traffic 'bits' goes by what devices tell"),
        ({"work": LocalWork(mask="consensus")}, "mask 'consensus': it is made from updates without noise"),
        ({"work": LocalWork(mask="nothing")}, "mask 'nothing'"),
    ],
)
def test_what_would_tell_of_a_device_beside_the_noise_is_refused(name, changes, said):
    assert said in said_of(dp=private(name), **changes)


def test_a_round_for_the_head_is_refused():
    said = said_of(dp=private(), head_start="class-mean")
    assert "head_start 'class-mean': class sums have no noise; 'none'" in said


@pytest.mark.parametrize("field", ["clip", "noise", "most_epsilon", "delta"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e300])
def test_a_number_that_cannot_be_is_refused_in_one_line(field, value):
    said = said_of(dp=private(**{field: value}))
    assert said.startswith(f"{field} must be ")
    assert "\n" not in said


@pytest.mark.parametrize("delta", [0.0, 1.0])
def test_delta_is_a_chance(delta):
    assert "delta must be above 0 and below 1" in said_of(dp=private(delta=delta))


def test_half_a_request_is_refused():
    assert said_of(dp=Privacy(name="central")) == "dp 'central': clip and noise must be above 0"
    assert said_of(dp=private(noise=0.0)) == "dp 'central': noise must be above 0"
    assert "clip 1: dp is 'none'" in said_of(dp=Privacy(clip=1.0))
    assert said_of(dp=private("federal")).startswith("no dp 'federal'; have: central")


def test_a_limit_that_no_round_keeps_is_refused():
    assert (
        said_of(dp=private(most_epsilon=1.0))
        == "most_epsilon 1: one round of a device has 4.377; give more noise"
    )
    check_settings(job(dp=private(most_epsilon=4.38)), Patience(), num_layers=4)


@pytest.mark.parametrize(
    ("name", "noise"), [("central", 0.0), ("distributed", 3.0 / math.sqrt(4)), ("local", 3.0)]
)
def test_a_device_is_told_its_bound_and_its_share_of_the_noise(name, noise):
    settings = job(dp=private(name, clip=0.5, noise=3.0), clients=9, min_clients=4)
    work = device_work(settings, round_number=1, position=0)
    assert (work.most_norm, work.noise) == (0.5, noise)


def test_another_noise_is_another_job():
    assert differences(job(dp=private(noise=2.0)), job(dp=private())) == ["dp.noise: 2.0, was 1.0"]


def of_samples(**changes):
    return private("sample", **{"sample_rate": 0.1, **changes})


@pytest.mark.parametrize(
    "changes",
    [
        {"strategy": "product"},
        {"work": LocalWork(codec="innovation", codec_bits=4)},
        {"down_codec": "int8"},
        {"clients": 4, "min_clients": 4, "secure": "masks"},
    ],
)
def test_what_comes_after_the_noise_of_each_step_is_free(changes):
    check_settings(job(dp=of_samples(), **changes), Patience(), num_layers=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dp": of_samples(sample_rate=0.0)}, "dp 'sample': sample_rate must be above 0"),
        ({"dp": of_samples(clip=0.0)}, "dp 'sample': clip must be above 0"),
        ({"dp": of_samples(noise=-1.0)}, "noise must be at least 0"),
        ({"dp": of_samples(clip=math.nan)}, "clip must be"),
        ({"dp": private(sample_rate=0.1)}, "sample_rate 0.1: it is of dp 'sample'"),
        ({"dp": Privacy(sample_rate=0.1)}, "sample_rate 0.1: dp is 'none'"),
        ({"dp": of_samples(), "head_start": "class-mean"}, "class sums have no noise"),
        ({"dp": of_samples(), "traffic": "caesar"}, "traffic 'caesar' goes by what devices tell"),
        ({"dp": of_samples(), "work": LocalWork(personal=1)}, "dp sample: personal keeps back layers"),
        ({"dp": of_samples(), "work": LocalWork(held_out=0.1)}, "dp sample: held_out measures samples"),
        ({"dp": of_samples(most_epsilon=0.01)}, "most_epsilon 0.01: one round of a device has"),
    ],
)
def test_what_would_tell_of_samples_is_refused_in_a_line(changes, said):
    assert said in said_of(**changes)


def test_devices_are_asked_to_hide_their_samples_and_nothing_of_whole_updates():
    work = device_work(job(dp=of_samples(clip=0.5, noise=1.5)), round_number=2, position=1)
    assert (work.sample_clip, work.sample_noise, work.sample_rate) == (0.5, 1.5, 0.1)
    assert (work.most_norm, work.noise) == (0.0, 0.0)
