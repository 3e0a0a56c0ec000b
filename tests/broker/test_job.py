import msgspec
import pytest
from rounds_by_hand import job

from fleetune.broker.job import Patience, Settings, check_settings, device_work, differences
from fleetune.device_runtime.contracts.wire import LocalWork
from fleetune.device_runtime.errors import ConfigError, UnknownName


def test_settings_are_checked_together():
    with pytest.raises(ConfigError) as caught:
        check_settings(
            job(rounds=0, clients=2, min_clients=3, work=LocalWork(batch_size=0)), Patience(deadline_s=-1)
        )
    for said in ("rounds 0", "min_clients 3: from 1 to clients (2)", "batch_size 0", "deadline_s -1"):
        assert said in str(caught.value)
    with pytest.raises(UnknownName, match="no strategy 'x'"):
        check_settings(job(strategy="x"), Patience())
    with pytest.raises(ConfigError, match="job 'a/b'"):
        check_settings(job(job="a/b"), Patience())


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
    ],
)
def test_a_codec_that_cannot_be_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_settings(job(**changes), Patience())


def test_every_device_of_every_round_has_a_seed_of_its_own():
    seeds = [device_work(job(seed=5), round_number=r, position=p).seed for r in (1, 2, 3) for p in range(50)]
    assert seeds[0] == 5
    assert len(set(seeds)) == 150


def test_every_device_of_a_round_knows_how_many_came_before():
    works = [device_work(job(), round_number=r, position=p) for r in (1, 2, 3) for p in range(2)]
    assert [work.rounds_before for work in works] == [0, 0, 1, 1, 2, 2]


def test_differences_name_the_fields():
    assert differences(job(), job(clients=3)) == ["clients: 2, was 3"]
