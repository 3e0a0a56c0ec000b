import pytest

from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.methods.work import TABLES, check_work, work_problems
from fleetune.device_runtime.options import problems


def test_numbers_and_names_that_are_wrong_are_listed_together():
    work = LocalWork(
        policy=PolicySpec(name="lazy", drop=2.0), optimizer=OptimizerSpec(lr=0.0), codec="zip", batch_size=0
    )
    found = "; ".join(work_problems(work, 4))
    for said in ("no policy 'lazy'", "drop must", "lr must be above 0", "no codec 'zip'", "batch_size must"):
        assert said in found
    with pytest.raises(ConfigError, match="nothing to do: steps and epochs are both 0"):
        check_work(LocalWork(steps=0, epochs=0), 4)


def test_what_only_the_policy_knows_is_asked_of_it():
    work = LocalWork(policy=PolicySpec(name="cyclic", drop=0.5))
    assert not problems(work, TABLES)
    with pytest.raises(ConfigError, match="a period of at least 1 step"):
        check_work(work, 4)


def test_one_unknown_name_is_an_unknown_name():
    with pytest.raises(UnknownName, match="no optimizer 'newton'; have: adamw, sgd"):
        check_work(LocalWork(optimizer=OptimizerSpec(name="newton")), 4)


@pytest.mark.parametrize(
    ("num_layers", "learning", "personal"),
    [(4, None, 4), (4, None, 2**31 - 1), (4, 2, 2), (1, None, 1), (4, 0, 1)],
)
def test_a_device_that_would_share_no_layer_is_refused(num_layers, learning, personal):
    have = num_layers if learning is None else learning
    with pytest.raises(
        ConfigError, match=f"personal {personal}: one layer at least is shared, and {have} have an adapter"
    ):
        check_work(LocalWork(personal=personal), num_layers, learning=learning)


def test_all_layers_but_one_may_stay_and_none_does_by_default():
    check_work(LocalWork(personal=3), 4)
    check_work(LocalWork(personal=1), 4, learning=2)
    assert LocalWork().personal == 0


@pytest.mark.parametrize("personal", [-1, 1e300, float("nan"), 2**31])
def test_a_number_of_personal_layers_that_is_none_is_refused(personal):
    with pytest.raises(ConfigError, match="personal"):
        check_work(LocalWork(personal=personal), 4)


def test_a_ranking_that_is_not_known_is_an_unknown_name():
    with pytest.raises(UnknownName, match="no ranking of layers 'loss'; have: importance, random, top"):
        check_work(LocalWork(personal_by="loss"), 4)


def test_no_layer_is_kept_from_learning_that_is_not_there():
    check_work(LocalWork(cache_below=4), 4)
    with pytest.raises(ConfigError, match="cache_below 5: the model has 4 layers"):
        check_work(LocalWork(cache_below=5), 4)


def test_a_ranking_where_no_layer_stays_is_refused():
    with pytest.raises(ConfigError, match="personal_by 'random': no layer stays personal"):
        check_work(LocalWork(personal_by="random"), 4)
