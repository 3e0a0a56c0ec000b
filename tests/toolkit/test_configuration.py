from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.commands.options import AGGREGATE
from fleetune.toolkit.configuration import MissingOption, resolve
from fleetune.toolkit.flags import claimed


def work(
    *,
    data: Path | str,
    out: Path,
    steps: int = 5,
    lr: float = 0.1,
    full: bool = False,
    names: list[str] | None = None,
) -> None:
    """Something a command calls."""


FLAGS = {"data": None, "out": None, "steps": None, "lr": None, "full": None, "names": None}


def given(tmp_path, text, **flags):
    config = tmp_path / "c.toml"
    config.write_text(text)
    return resolve(work, FLAGS | flags, config=config, table="train")


def test_flags_win_over_the_file_and_defaults_are_left_alone(tmp_path):
    found = given(tmp_path, 'data = "a"\nout = "b"\nsteps = 7\nlr = 1\n', steps=9)
    assert found == {"data": Path("a"), "out": Path("b"), "steps": 9, "lr": 1.0}
    assert isinstance(found["lr"], float)


def test_a_false_flag_is_a_given_flag(tmp_path):
    assert given(tmp_path, 'data = "a"\nout = "b"\nfull = true\n', full=False)["full"] is False


def test_the_table_of_the_command_wins_over_flat_keys_and_others_are_ignored(tmp_path):
    text = (
        'data = "a"\nout = "b"\nsteps = 1\n[train]\nsteps = 2\nnames = ["x", "y"]\n[aggregate]\nrounds = 3\n'
    )
    found = given(tmp_path, text)
    assert found["steps"] == 2
    assert found["names"] == ["x", "y"]


def test_dashes_are_as_good_as_underscores(tmp_path):
    assert resolve(work, FLAGS | {"data": "a", "out": "b"}) == {"data": "a", "out": "b"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("speed = 1\n", ["'speed'", "have: data, full, lr, names, out, steps"]),
        ('steps = "many"\n', ["steps = 'many'", "Expected `int`"]),
        ("steps = 1.5\n", ["steps = 1.5", "int"]),
        ("[trian]\nsteps = 1\n", ["[trian]", "aggregate, device, export, rules, status, train, watch"]),
        ("steps =\n", ["cannot be read as TOML"]),
    ],
)
def test_what_is_wrong_in_a_file_is_named(tmp_path, text, words):
    with pytest.raises(ConfigError) as caught:
        given(tmp_path, text, data="a", out="b")
    assert all(word in str(caught.value) for word in ("c.toml", *words))


def test_all_mistakes_are_told_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"(?s)speed.*steps = 'x'|steps = 'x'.*speed"):
        given(tmp_path, "speed = 1\nsteps = 'x'\n")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        resolve(work, FLAGS, config=tmp_path / "none.toml", table="train")


def test_what_is_missing_everywhere_is_a_usage_error():
    with pytest.raises(MissingOption, match=r"^needs --data and --out$"):
        resolve(work, FLAGS, table="train")


def careful(*, steps: int = 1, rules: Mapping[str, Any] | Path | str | None = None) -> None:
    """Something that takes rules."""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[rules]\nload = { max_share = 0.5 }\n", {"load": {"max_share": 0.5}}),
        ("[rules.load]\nmax_share = 0.5\n[train]\nsteps = 2\n", {"load": {"max_share": 0.5}}),
        ("[rules]\nnice = 1\n[train]\nrules = { nice = 2 }\n", {"nice": 2}),
        ("[rules]\nnice = 1\n[train]\nrules = 'mine.toml'\n", Path("mine.toml")),
        ("rules = 'mine.toml'\n", Path("mine.toml")),
    ],
)
def test_a_table_of_rules_is_for_every_command_that_takes_it(tmp_path, text, expected):
    config = tmp_path / "c.toml"
    config.write_text(text)
    found = resolve(careful, {"steps": None, "rules": None}, config=config, table="train")
    assert found["rules"] == expected
    flag = resolve(careful, {"steps": None, "rules": Path("x")}, config=config, table="train")
    assert flag["rules"] == Path("x")


def test_a_command_without_rules_leaves_the_table_alone(tmp_path):
    assert given(tmp_path, "[rules]\nnice = 1\n", data="a", out="b").keys() == {"data", "out"}


def test_rules_that_are_no_table_are_refused(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text("rules = 3\n")
    with pytest.raises(ConfigError, match=r"c\.toml: rules = 3: Expected"):
        resolve(careful, {"rules": None}, config=config, table="train")


def combine(*, mqtt: str, job: Job, work: LocalWork = LocalWork(), on_round: object = None) -> None:
    """Something that takes structs."""


PARTS = {"job": AGGREGATE["job"], "work": AGGREGATE["work"]}
OF_STRUCTS = dict.fromkeys(["mqtt", *claimed(PARTS)])


def test_structs_are_made_of_file_and_flags_alike(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text(
        'mqtt = "mqtt://x"\n[aggregate]\njob = "home"\nrounds = 3\nclients = 2\nlocal-steps = 9\nlr = 1\n'
    )
    given = OF_STRUCTS | {"clients": 4, "policy": "suffix", "drop": 0.5}
    found = resolve(combine, given, config=config, table="aggregate", parts=PARTS)
    assert found == {
        "mqtt": "mqtt://x",
        "job": Job("home", rounds=3, clients=4),
        "work": LocalWork(
            steps=9, policy=PolicySpec(name="suffix", drop=0.5), optimizer=OptimizerSpec(lr=1.0)
        ),
    }


def test_a_key_that_no_struct_claims_is_named_with_those_there_are(tmp_path):
    config = tmp_path / "c.toml"
    config.write_text('batchsize = 99\nlr = "fast"\n')
    with pytest.raises(ConfigError, match=r"unknown key 'batchsize'; have: .*batch_size.*; lr = 'fast'"):
        resolve(combine, OF_STRUCTS, config=config, table="aggregate", parts=PARTS)


def test_a_field_without_default_must_be_given():
    with pytest.raises(MissingOption, match=r"^needs --mqtt, --rounds and --clients"):
        resolve(combine, OF_STRUCTS | {"job": "home"}, table="aggregate", parts=PARTS)
