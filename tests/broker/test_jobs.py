import msgspec
import pytest
from rounds_by_hand import job

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.privacy import Privacy
from fleetune.broker.jobs.settings import Job, Settings, differences
from fleetune.broker.jobs.work import device_work, settings_of
from fleetune.broker.laws import check_settings
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import ConfigError, UnknownName


def test_settings_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        check_settings(
            job(
                rounds=0,
                clients=2,
                min_clients=3,
                work=LocalWork(batch_size=0, optimizer=OptimizerSpec(name="x")),
            ),
            Patience(deadline_s=-1),
            num_layers=4,
        )
    for said in (
        "rounds must be at least 1, got 0",
        "min_clients 3: from 1 to clients (2)",
        "batch_size must be at least 1, got 0",
        "no optimizer 'x'; have: adamw, sgd",
        "deadline_s must be at least 0, got -1",
    ):
        assert said in str(caught.value)
    with pytest.raises(UnknownName, match="no strategy 'x'"):
        check_settings(job(strategy="x"), Patience(), num_layers=4)
    with pytest.raises(ConfigError, match="job 'a/b'"):
        check_settings(job(job="a/b"), Patience(), num_layers=4)


OLD = """{"job":"j","artifact":"%s","rounds":2,"clients":2,"min_clients":1,"strategy":"fedavg","work":{"policy":
{"name":"full","drop":0.0,"shape":"uniform","period":0},"optimizer":{"name":"adamw","lr":0.002,"weight_decay":0.0,
"warmup_steps":0,"decay":"constant","clip_norm":0.0},"steps":4,"epochs":1,"batch_size":16,"seq_len":128,"seed":0,
"codec":"int8","rounds_before":0},"seed":0,"evaluate_every":1}"""


def test_the_settings_of_a_job_of_0_1_0_are_those_of_today():
    found = msgspec.json.decode(OLD % ("a" * 64), type=Settings)
    assert differences(job(min_clients=1, work=LocalWork(codec="int8", steps=4)), found) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"work": LocalWork(codec="zip")}, "no codec 'zip'"),
        ({"work": LocalWork(codec="topk")}, "codec 'topk': its ratio is above 0"),
        ({"work": LocalWork(codec="int8", codec_ratio=0.1)}, "codec 'int8' sends all elements"),
        ({"down_codec": "zip"}, "no codec 'zip'"),
        ({"down_codec": "topk"}, "codec 'topk': its ratio is above 0"),
        ({"down_ratio": 0.5}, "down_ratio 0.5: 'full' has none"),
        ({"down_bits": 8}, "down_bits 8: 'full' has none"),
        ({"down_codec": "int8", "down_bits": 4}, "codec 'int8' has no bits to choose, got 4"),
        (
            {"down_codec": "topk", "down_ratio": 0.1, "down_bits": 3},
            "codec 'topk': its bits are 4 or 8 or 16, got 3",
        ),
        ({"down_codec": "innovation"}, "down_codec 'innovation': it remembers each device's updates"),
        ({"work": LocalWork(codec="fp32", codec_bits=8)}, "codec 'fp32' has no bits to choose, got 8"),
        ({"work": LocalWork(codec_bits=-1)}, "codec_bits must be at least 0, got -1"),
    ],
)
def test_a_codec_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_settings(job(**changes), Patience(), num_layers=4)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"work": LocalWork(rank=4)},
            "rank 4: strategy 'fedavg' averages whole tensors; of parts: hetlora, product",
        ),
        (
            {"work": LocalWork(frozen="lora-a"), "strategy": "product"},
            "frozen 'lora-a': strategy 'product' makes A anew",
        ),
        ({"work": LocalWork(frozen="lora-b")}, "no frozen 'lora-b'; have: '', lora-a"),
        (
            {"work": LocalWork(rows=2)},
            "rows 2: strategy 'fedavg' averages whole tensors; of parts: hetlora, product",
        ),
        ({"work": LocalWork(rows=-1)}, "rows must be at least 0, got -1"),
        (
            {"work": LocalWork(rank=2, rows=3), "strategy": "product"},
            "rows 3: of the 2 components of the rank",
        ),
        ({"mask_share": 0.5}, "mask_share and mask_every are of mask .consensus."),
        ({"mask_share": 0.0, "work": LocalWork(mask="consensus")}, "mask_share must be above 0, got 0.0"),
        ({"mask_share": 1e300, "work": LocalWork(mask="consensus")}, "mask_share must be at most 1"),
        ({"mask_share": float("nan"), "work": LocalWork(mask="consensus")}, "mask_share"),
        ({"mask_every": -1, "work": LocalWork(mask="consensus")}, "mask_every must be at least 0, got -1"),
        ({"mask_every": 1, "work": LocalWork(mask="consensus")}, "mask_every 1: every round would vote"),
        ({"work": LocalWork(mask="majority")}, "no mask 'majority'; have: '', consensus"),
        (
            {"work": LocalWork(mask="consensus", rows=2), "strategy": "rank-mean"},
            "mask 'consensus': it is of whole tensors; leave rows out",
        ),
        (
            {"work": LocalWork(mask="consensus", codec="innovation")},
            "codec 'innovation': it remembers whole tensors; leave mask out",
        ),
        (
            {"work": LocalWork(rows=2, codec="innovation", codec_bits=4), "strategy": "rank-mean"},
            "codec 'innovation': it remembers whole tensors; leave rows out",
        ),
        ({"work": LocalWork(rank=-1)}, "rank must be at least 0, got -1"),
        ({"configurator": "ranks"}, "configurator 'ranks': give the largest rank"),
        (
            {"configurator": "caf"},
            "no configurator 'caf'; have: auto, caff, fedadapter, fedcybgd, fixed, random-depth",
        ),
        (
            {"configurator": "caff", "work": LocalWork(policy=PolicySpec(name="suffix", drop=0.5))},
            "policy 'suffix': configurator 'caff' chooses the layers itself",
        ),
    ],
)
def test_what_cannot_go_together_is_refused_at_the_start(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_settings(job(**changes), Patience(), num_layers=4)


def test_what_goes_together_is_taken():
    for strategy in ("product", "hetlora", "rank-mean"):
        check_settings(job(work=LocalWork(rank=4), strategy=strategy), Patience(), num_layers=4)
    check_settings(job(work=LocalWork(frozen="lora-a")), Patience(), num_layers=4)


def test_every_device_of_every_round_has_a_seed_of_its_own():
    seeds = [device_work(job(seed=5), round_number=r, position=p).seed for r in (1, 2, 3) for p in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 150


def test_every_device_of_a_round_knows_how_many_came_before():
    works = [device_work(job(), round_number=r, position=p) for r in (1, 2, 3) for p in range(2)]
    assert [work.rounds_before for work in works] == [0, 0, 1, 1, 2, 2]


def test_differences_name_the_fields():
    assert differences(job(), job(clients=3)) == ["clients: 2, was 3"]
    slower = job(work=LocalWork(optimizer=OptimizerSpec(lr=1e-4), steps=7))
    faster = job(work=LocalWork(optimizer=OptimizerSpec(lr=1e-3), steps=7))
    assert differences(slower, faster) == ["work.optimizer.lr: 0.0001, was 0.001"]


def test_a_neighbouring_job_shares_no_seed_of_a_device_but_its_own():
    near = [
        {device_work(job(seed=seed), round_number=r, position=p).seed for r in (1, 2, 3) for p in range(50)}
        for seed in (5, 6)
    ]
    assert not near[0] & near[1]


def test_a_seed_that_not_every_language_holds_is_refused():
    for seed in (-1, 2**53):
        with pytest.raises(
            ConfigError, match=rf"seed must be at least 0 and below 9007199254740992, got {seed}"
        ):
            check_settings(job(seed=seed), Patience(), num_layers=4)


def test_an_operators_job_becomes_settings_and_no_minimum_is_all_clients():
    work = LocalWork(steps=3)
    settings = settings_of(Job("j", rounds=2, clients=3), artifact="a" * 64, work=work)
    assert settings == job(clients=3, min_clients=3, work=work)
    assert settings_of(Job("j", rounds=2, clients=3, min_clients=1), artifact="", work=work).min_clients == 1


@pytest.mark.parametrize("work", [LocalWork(seed=5), LocalWork(rounds_before=1)])
def test_work_with_what_a_device_gets_of_its_own_is_refused(work):
    """It would be overwritten for each device, and nobody would know."""
    with pytest.raises(ConfigError, match=r"work: (seed|rounds_before) cannot be given"):
        settings_of(Job("j", rounds=2, clients=3), artifact="", work=work)


def test_the_aggregator_refuses_what_a_device_would_decline():
    wrong = job(work=LocalWork(policy=PolicySpec(name="cyclic", drop=0.5)))
    with pytest.raises(ConfigError, match="needs a period of at least 1 step"):
        check_settings(wrong, Patience(), num_layers=4)
    check_settings(job(), Patience(), num_layers=4)
    selfish = job(work=LocalWork(personal=2))
    check_settings(selfish, Patience(), num_layers=4)
    with pytest.raises(ConfigError, match="personal 2: one layer at least is shared, and 2 have an adapter"):
        check_settings(selfish, Patience(), num_layers=4, learning=2)


OF_0_1_0 = b"""{"job":"j","artifact":"%s","rounds":2,"clients":2,"min_clients":2,"strategy":"fedavg",
"work":{"policy":{"name":"suffix","drop":0.5,"shape":"uniform","period":0},"optimizer":{"name":"adamw","lr":0.002,
"weight_decay":0.0,"warmup_steps":0,"decay":"constant","clip_norm":0.0},"steps":3,"epochs":1,"batch_size":16,"seq_len":128,
"seed":0,"codec":"fp32","rounds_before":0},"seed":0,"evaluate_every":1}"""


def test_a_job_of_0_1_0_goes_on():
    """The ledger keeps settings as text, and compares."""
    theirs = msgspec.json.decode(OF_0_1_0 % (b"a" * 64), type=Settings)
    mine = job(work=LocalWork(policy=PolicySpec(name="suffix", drop=0.5), steps=3))
    assert differences(mine, theirs) == []


def test_policy_auto_is_short_for_the_configurator_and_holds_samples_back():
    made = settings_of(
        Job("j", rounds=1, clients=1), artifact="a", work=LocalWork(policy=PolicySpec(name="auto"))
    )
    assert (made.configurator, made.work.policy, made.work.held_out) == ("auto", PolicySpec(), 0.1)
    own = LocalWork(policy=PolicySpec(name="suffix", drop=0.5), held_out=0.2)
    made = settings_of(Job("j", rounds=1, clients=1, configurator="auto"), artifact="a", work=own)
    assert (made.work.policy, made.work.held_out) == (own.policy, 0.2)


def test_policy_auto_takes_no_settings():
    work = LocalWork(policy=PolicySpec(name="auto", drop=0.5))
    with pytest.raises(
        ConfigError, match="policy 'auto' chooses each device's policy with its settings; give none"
    ):
        settings_of(Job("j", rounds=1, clients=1), artifact="a", work=work)


def test_policy_auto_is_no_other_configurator():
    work = LocalWork(policy=PolicySpec(name="auto"))
    with pytest.raises(ConfigError, match="policy 'auto' is a configurator too, beside 'caff'; give one"):
        settings_of(Job("j", rounds=1, clients=1, configurator="caff"), artifact="a", work=work)
    assert settings_of(Job("j", rounds=1, clients=1, configurator="auto"), artifact="a", work=work)


def test_how_many_layers_there_are_makes_no_other_job_where_it_was_not_known():
    known = settings_of(Job("j", rounds=1, clients=1), artifact="a", work=LocalWork(), num_layers=6)
    assert differences(known, msgspec.structs.replace(known, num_layers=0)) == []
    assert differences(known, msgspec.structs.replace(known, num_layers=12)) == ["num_layers: 6, was 12"]


def test_fixed_has_nothing_to_explore():
    settings = settings_of(Job("j", rounds=1, clients=1, explore="ucb"), artifact="a", work=LocalWork())
    with pytest.raises(ConfigError, match="explore 'ucb': configurator 'fixed' explores nothing"):
        check_settings(settings, Patience(), num_layers=6)


MASKED = {"clients": 4, "min_clients": 3, "secure": "masks"}


def test_a_job_of_masked_sums_is_lawful():
    check_settings(job(**MASKED), Patience(), num_layers=4)
    check_settings(
        job(**{**MASKED, "strategy": "fedavgm", "work": LocalWork(frozen="lora-a")}), Patience(), num_layers=4
    )


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"strategy": "product"}, "strategy 'product' needs single updates; fedavg, fedavgm"),
        ({"configurator": "caff"}, "configurator 'caff' goes by single devices"),
        ({"traffic": "caesar"}, "traffic 'caesar' goes by single devices"),
        ({"head_start": "class-mean"}, "head_start 'class-mean' sends each device's class sums"),
        ({"work": LocalWork(codec="int8")}, "codec 'int8'; its updates are packed in secure_bits alone"),
        ({"work": LocalWork(codec="innovation"), "lazy": 0.1}, "codec 'innovation'"),
        ({"work": LocalWork(mask="consensus")}, "leave mask out"),
        ({"work": LocalWork(personal=1)}, "leave personal out"),
        ({"work": LocalWork(rank=2), "strategy": "hetlora"}, "leave rank out"),
        ({"work": LocalWork(held_out=0.1)}, "leave held_out out"),
        ({"min_clients": 2}, "min_clients 2; a sum hides an update among 3 or more"),
        ({"secure_neighbours": 2}, "secure_neighbours 2; 0, or 3 and more"),
        ({"secure_neighbours": 513}, "secure_neighbours must be"),
        ({"secure_bits": 1}, "secure_bits must be at least 2"),
        ({"secure_bits": 25}, "secure_bits must be"),
        ({"secure_weight_bits": 21}, "secure_weight_bits must be"),
        ({"secure_threshold": 0.5}, "secure_threshold must be above 0.5"),
        ({"secure_threshold": 1.1}, "secure_threshold must be at most 1"),
        ({"secure_threshold": float("nan")}, "secure_threshold must be"),
        ({"secure_range": 0.0}, "secure_range must be above 0"),
        ({"secure_range": float("nan")}, "secure_range must be"),
        ({"secure_range": 1e300}, "secure_range must be at most 1000000"),
        ({"secure": "yes"}, "no secure 'yes'; have: grid, masks, no"),
        ({"secure": "no", "secure_bits": 8}, "secure_bits: of a job with secure 'masks' or 'grid'"),
        ({"clients": 10**7, "secure_bits": 24, "secure_weight_bits": 20}, "at most 62 bits in all"),
    ],
)  # fmt: skip
def test_what_masked_sums_cannot_have_is_told(changes, said):
    with pytest.raises(ConfigError) as caught:
        check_settings(job(**MASKED | changes), Patience(), num_layers=4)
    assert said in str(caught.value)


@pytest.mark.parametrize("secure", ["masks", "grid"])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("central", "bounds each update, and here the aggregator looks at none; leave it out"),
        ("distributed", "these are rounded one by one; leave it out"),
        ("local", "a sum on the grid by the weight of those that came; leave it out"),
    ],
)
def test_sums_go_with_no_differential_privacy(secure, name, why):
    privacy = Privacy(name=name, clip=1.0, noise=4.0)
    with pytest.raises(ConfigError) as caught:
        check_settings(job(**{**MASKED, "secure": secure, "dp": privacy}), Patience(), num_layers=4)
    assert f"secure {secure!r}: dp {name!r} " in str(caught.value)
    assert why in str(caught.value)


@pytest.mark.parametrize("strategy", ["median", "trimmed", "krum", "multi-krum"])
@pytest.mark.parametrize("secure", ["masks", "grid"])
def test_sums_have_no_strategy_that_looks_at_single_updates(secure, strategy):
    with pytest.raises(ConfigError, match=f"strategy '{strategy}' needs single updates"):
        check_settings(job(**{**MASKED, "secure": secure, "strategy": strategy}), Patience(), num_layers=4)


def test_a_masked_job_offers_a_codec_that_old_devices_do_not_know():
    work = device_work(job(**MASKED), round_number=1, position=0)
    assert work.codec == "masked"
    assert job(**MASKED).grid.bits == 16
    assert job().grid.bits == 0
    assert device_work(job(), round_number=1, position=0).codec == "fp32"
