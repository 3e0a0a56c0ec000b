"""Traffic planners: their laws, and Caesar's and the bitwidths' numbers by hand."""

import math

import pytest
from paths import ROOT
from rounds_by_hand import job, task

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.laws import check_settings
from fleetune.broker.methods.bitwidth import WIDTHS, usual_s
from fleetune.broker.methods.caesar import (
    WINDOW,
    divergence,
    halfway,
    linear,
    up_shares,
    windowed,
)
from fleetune.broker.methods.seen import Fleet, Seen, blank, note
from fleetune.broker.methods.traffic import TRAFFIC, laid_over
from fleetune.broker.tasks import Noted, Outcome
from fleetune.device_runtime.contracts.codecs import make_codec
from fleetune.device_runtime.contracts.fields import COUNT_MAX, FIGURE_MAX
from fleetune.device_runtime.contracts.work import FULL, LocalWork
from fleetune.device_runtime.errors import ConfigError

CHOOSING = [name for name in TRAFFIC if name != "fixed"]
CAESARS = [name for name in TRAFFIC if name.startswith("caesar")]
ELEMENTS = 100_000
DOWN_MAX, UP_MIN, UP_MAX = 0.6, 0.1, 0.6
WORK = LocalWork(steps=10, batch_size=16)


def settings(name, **changes):
    return job(**{"traffic": name, "num_elements": ELEMENTS, "num_classes": 3, "rounds": 99, **changes})


def outcome(
    device, number=1, *, seconds=1.6, down=1e6, up=1e5, num_samples=100, histogram=(), asked=False, **of
):
    """An update of a device that takes ``seconds`` for 160 samples, over a link of so many bytes a second."""
    work = LocalWork(steps=10, batch_size=16, histogram=asked or bool(histogram))
    noted = Noted(
        bytes_down=400_000,
        seconds_down=400_000 / down,
        bytes_up=200_000,
        seconds_up=200_000 / up,
        histogram=histogram,
    )
    return Outcome(device, work, {"seconds": seconds, **of}, None, number, num_samples, noted)


def planned(name, outcomes=(), *, number=2, devices="ab", deadline_s=0.0, work=WORK, **changes):
    """Tasks of devices that are asked at once after these outcomes, by name."""
    traffic, given = TRAFFIC[name](), settings(name, work=work, **changes)
    state = traffic.init(given)
    for one in outcomes:
        state = traffic.learn(state, one)
    tasks = [task(device, number, i, work=work) for i, device in enumerate(devices)]
    return {t.device_id: t for t in laid_over(traffic, state, tasks, deadline_s=deadline_s)}


LIES = [
    {"seconds": float("nan")},
    {"loss": float("nan")},
    {"loss": 1e300},
    {"loss": -5.0},
    {"seconds": 1e300},
    {"seconds": -1.0},
    {"seconds": FIGURE_MAX},
    {"seconds": 1e-300},
    {"down": 1e300},
    {"up": 1e300},
    {"down": 1e-300, "up": 1e-300},
    {"num_samples": COUNT_MAX},
    {"num_samples": 0},
    {"histogram": (COUNT_MAX, 0, 0), "num_samples": 1},
    {"histogram": (0, 0, 0)},
    {"histogram": (1,)},
]


@pytest.mark.parametrize("name", CHOOSING)
@pytest.mark.parametrize("lie", [{}, *LIES])
def test_law_whatever_a_device_says_every_choice_is_lawful(name, lie):
    told = outcome("liar", **lie)
    chosen = planned(
        name, [outcome("a"), told, outcome("b", up=2e5)], number=3, devices=["a", "b", "liar", "new"]
    )
    for one in chosen.values():
        make_codec(one.work.codec, one.work.codec_ratio, one.work.codec_bits)
        assert 4 <= one.work.batch_size <= 16
        if (down := one.plan.down) and down.codec != FULL:
            make_codec(down.codec, down.ratio, down.bits)
            assert 1 - DOWN_MAX <= down.ratio <= 1


@pytest.mark.parametrize("name", CHOOSING)
def test_law_to_choose_twice_is_to_choose_the_same_and_all_else_is_the_work_s(name):
    past = [outcome("a"), outcome("b", up=1e4, seconds=5.0)]
    assert planned(name, past) == planned(name, past)
    work = LocalWork(steps=7, seq_len=32, held_out=0.2)
    for one in planned(name, past, work=work).values():
        assert (one.work.steps, one.work.seq_len, one.work.held_out) == (7, 32, 0.2)
        assert (one.plan.together, one.task_id, one.version) == (0, f"train-2-{one.device_id}", 1)


def test_fixed_changes_nothing():
    tasks = [task("a", 1)]
    assert laid_over(TRAFFIC["fixed"](), None, tasks, deadline_s=9.0) == tasks


def test_every_planner_is_told_of_in_the_docs():
    told = (ROOT / "docs" / "operate.md").read_text()
    assert [name for name in TRAFFIC if f"`{name}`" not in told] == []


@pytest.mark.parametrize("share", [linear, windowed, halfway])
def test_law_a_share_is_within_its_bounds_and_who_never_was_there_gets_everything(share):
    for number in (1, 2, WINDOW, WINDOW + 1, 500):
        shares = [share(away, number) for away in range(1, number + 1)]
        assert all(0 <= one <= 1 for one in shares)
        assert shares[-1] == 0
        assert shares == sorted(shares, reverse=True), "the longer away, the less is compressed"


def test_caesar_compresses_as_the_paper_and_the_window_forgets_after_20_rounds():
    assert linear(50, 500) == pytest.approx(0.9)
    assert windowed(50, 500) == 0
    assert windowed(5, 500) == pytest.approx(0.75)
    assert windowed(5, 10) == linear(5, 10) == pytest.approx(0.5)


@pytest.mark.parametrize("name", CAESARS)
def test_a_device_that_is_back_after_50_rounds_is_sent_more_than_one_of_the_round_before(name):
    past = [outcome("back", 10), outcome("here", 59)]
    chosen = planned(name, past, number=60, devices=["back", "here", "new"])
    assert chosen["new"].plan.down.codec == FULL
    if name == "caesar-window":
        assert chosen["back"].plan.down.codec == FULL
    else:
        is_fixed = name == "caesar-fixed-ratio"
        assert (chosen["back"].plan.down == chosen["here"].plan.down) == is_fixed
        assert chosen["back"].plan.down.ratio >= chosen["here"].plan.down.ratio
    if name in ("caesar", "caesar-uniform", "caesar-sign", "caesar-zero"):
        assert chosen["back"].plan.down.ratio == pytest.approx(1 - DOWN_MAX * (1 - 50 / 60))
        assert chosen["here"].plan.down.ratio == pytest.approx(1 - DOWN_MAX * (1 - 1 / 60))


def test_importance_ranks_all_known_devices_not_those_asked_and_needs_labels_for_half_of_it():
    past = [
        outcome("many", num_samples=1000, histogram=(1000, 0, 0)),
        outcome("even", num_samples=900, histogram=(300, 300, 300)),
        outcome("few", num_samples=10, histogram=(10, 0, 0)),
        outcome("silent", num_samples=500, asked=True),
    ]
    shares = up_shares(_fleet(past))
    assert sorted(shares, key=shares.get) == ["even", "many", "silent", "few"]
    step = (UP_MAX - UP_MIN) / 4
    assert shares["even"] == pytest.approx(UP_MIN + step)
    assert shares["few"] == pytest.approx(UP_MAX)
    chosen = planned("caesar", past, devices=["few", "new"])
    assert chosen["few"].work.codec_ratio == pytest.approx(1 - UP_MAX)
    assert chosen["new"].work.codec_ratio == pytest.approx(1 - (UP_MIN + UP_MAX) / 2), "in the middle"
    assert (
        planned("caesar-uniform", past)["a"].work.codec_ratio
        == planned("caesar-uniform", past)["b"].work.codec_ratio
    )


def test_a_liar_about_its_samples_takes_no_other_device_s_place():
    honest = [outcome(name, num_samples=n) for name, n in (("a", 30), ("b", 20), ("c", 10))]
    shares = up_shares(_fleet([*honest, outcome("liar", num_samples=COUNT_MAX)]))
    assert sorted(shares, key=shares.get) == ["liar", "a", "b", "c"]


def test_divergence_is_from_the_uniform_distribution_with_every_count_raised_by_one():
    assert divergence((7, 7, 7)) == 0
    assert divergence((2, 0)) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert divergence((COUNT_MAX, 0, 0)) < math.log(3)


def test_a_device_is_asked_for_its_labels_once_and_only_if_the_job_does():
    asking = LocalWork(steps=10, histogram=True)
    first = planned("caesar", work=asking, number=1)
    assert first["a"].work.histogram
    known = [outcome("a", histogram=(1, 2, 3)), outcome("b", asked=True)]
    later = planned("caesar", known, work=asking, devices="abc")
    assert [later[name].work.histogram for name in "abc"] == [False, False, True]
    assert not planned("caesar")["a"].work.histogram


def test_batches_are_such_that_devices_finish_with_the_first():
    past = [outcome("quick", seconds=1.6), outcome("slow", seconds=3.2), outcome("lame", seconds=160.0)]
    past = [one._replace(noted=Noted()) for one in past]
    chosen = planned("caesar", past, devices=["quick", "slow", "lame", "new"])
    assert [t.work.batch_size for t in chosen.values()] == [16, 8, 4, 16]
    alone = planned("caesar", past, devices=["slow", "lame"])
    assert alone["slow"].work.batch_size == 16, "the first of those who are asked"
    by_link = planned("caesar", [outcome("a"), outcome("b", down=5e4, up=5e4)])
    assert by_link["a"].work.batch_size == 16
    assert by_link["b"].work.batch_size == 4, "the transfers alone take longer than the first device"
    assert planned("caesar-one-batch", past, devices=["slow", "quick"])["slow"].work.batch_size == 16
    epochs = planned("caesar", past, devices=["quick", "slow"], work=LocalWork(epochs=1))
    assert epochs["slow"].work.batch_size == 16, "an epoch takes as long in any batches"


def test_bits_are_the_most_that_fit_the_deadline_on_the_measured_link():
    # 1.6 s of training, 400 kB down at 1 MB/s: 2 s; at b bits 12.5 kB * b up.
    def bits_at(up, deadline_s):
        chosen = planned("bits", [outcome("a", up=up)], deadline_s=deadline_s)
        return chosen["a"].work.codec, chosen["a"].work.codec_bits

    assert bits_at(1e5, 10.0) == ("quant", 16), "4.0 of 9 s"
    assert bits_at(1e5, 4.0) == ("quant", 8), "3.0 of 3.6 s; 16 bits take 4.0"
    assert bits_at(1e4, 10.0) == ("quant", 4), "7.0 of 9 s; 8 bits take 12"
    assert bits_at(100.0, 10.0) == ("quant", 1), "none fits"
    assert planned("bits", deadline_s=10.0)["a"].work.codec == "fp32", (
        "as the job says while nothing is known"
    )


def test_without_a_deadline_devices_keep_the_pace_of_the_middle_one_with_8_bits():
    past = [outcome("a", up=1e5), outcome("b", up=5e4), outcome("c", up=1e4)]
    assert usual_s(_fleet(past), WORK) == pytest.approx(2.0 + 1e5 / 5e4)
    chosen = planned("bits", past, devices="abc")
    assert [t.work.codec_bits for t in chosen.values()] == [16, 8, 1]
    assert {t.work.codec_bits for t in chosen.values()} <= set(WIDTHS)
    assert len({t.reason for t in chosen.values()}) == 3


def test_the_simple_planners_go_by_uplink_and_by_samples_times_loss():
    past = [
        outcome("a", up=4e5, num_samples=10, loss=9.0),
        outcome("b", up=3e5, num_samples=80, loss=1.0),
        outcome("c", up=2e5, num_samples=70, loss=1.0),
        outcome("d", up=1e5, num_samples=10, loss=1.0),
    ]

    def ratios(name):
        return [t.work.codec_ratio for t in planned(name, past, devices="abcd").values()]

    assert ratios("flexcom-like") == pytest.approx([0.775, 0.65, 0.525, 0.4])
    assert ratios("pyramidfl-like") == pytest.approx([0.775, 0.65, 0.525, 0.4])
    swapped = [
        one._replace(stats={**one.stats, "loss": 0.0}) if one.device_id == "a" else one for one in past
    ]
    last = planned("pyramidfl-like", swapped, devices="a")["a"]
    assert last.work.codec_ratio == pytest.approx(0.4)
    bits = [t.work.codec_bits for t in planned("prowd-like", past, devices="abcd").values()]
    assert bits == [16, 8, 4, 2]
    assert all(t.plan.down is None for t in planned("flexcom-like", past).values())


def test_a_small_transfer_only_raises_what_is_believed_of_a_link():
    small = outcome("a")._replace(noted=Noted(bytes_up=100, seconds_up=1.0))
    fast = outcome("a")._replace(noted=Noted(bytes_up=1000, seconds_up=0.001))
    assert _fleet([outcome("a", up=1e5), small]).devices["a"].up == pytest.approx(1e5)
    assert _fleet([outcome("a", up=1e5), fast]).devices["a"].up == pytest.approx(1e6)
    assert _fleet([fast, outcome("a", up=1e5)]).devices["a"].up == pytest.approx(1e5)


@pytest.mark.parametrize("rate", [1e300, 1e-300])
def test_a_link_that_cannot_be_is_not_believed(rate):
    fleet = _fleet([outcome("a", up=1e5, down=1e6), outcome("a", up=rate, down=rate)])
    assert (fleet.devices["a"].up, fleet.devices["a"].down) == (pytest.approx(1e5), pytest.approx(1e6))


def test_smaller_batches_do_not_make_a_device_look_slow():
    small = outcome("a", seconds=1.6)
    small = small._replace(work=LocalWork(steps=10, batch_size=4))
    fleet = _fleet([outcome("a", seconds=1.6), small])
    assert fleet.devices["a"].sample_s == pytest.approx(0.01)
    assert _fleet([small]).devices["a"].sample_s == pytest.approx(0.04)
    assert note(fleet, outcome("a", seconds=3.2)).devices["a"].sample_s == pytest.approx(0.02)


def test_a_declined_task_is_no_part_taken():
    fleet = note(Fleet(settings("caesar"), {"a": Seen(3)}), outcome("a", 9)._replace(declined="memory"))
    assert fleet.devices["a"].round == 3


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"traffic": "caesar", "work": LocalWork(codec="int8")},
            "codec 'int8': traffic planner 'caesar' chooses it",
        ),
        (
            {"traffic": "caesar", "down_codec": "int8"},
            "down_codec 'int8': traffic planner 'caesar' chooses it",
        ),
        (
            {"traffic": "fixed", "work": LocalWork(histogram=True)},
            "histogram: traffic planner 'fixed' has no use",
        ),
        ({"traffic": "caesar-uniform", "work": LocalWork(histogram=True)}, "'caesar-uniform' has no use"),
        (
            {"traffic": "caesar", "work": LocalWork(codec_bits=3)},
            "codec 'topk': its bits are 4 or 8 or 16, got 3",
        ),
        ({"traffic": "caesar", "down_bits": 8}, "codec 'caesar': its bits are 16 or 32, got 8"),
        ({"traffic": "caesar", "compress_up_min": 0.7}, "compress_up_min 0.7: at most compress_up"),
        ({"traffic": "caesar", "compress_down": 1.0}, "compress_down must be at least 0 and below 1"),
        ({"traffic": "cesar"}, "no traffic planner 'cesar'; have: bits, caesar, "),
    ],
)
def test_what_contradicts_a_planner_is_refused_before_the_job_begins(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_settings(job(**changes), Patience(), num_layers=6)


def _fleet(outcomes):
    fleet = blank(settings("caesar"))
    for one in outcomes:
        fleet = note(fleet, one)
    return fleet
