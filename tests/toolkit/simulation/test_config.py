"""The TOML of a simulation: what is wrong is named with its path and the choices, all at once."""

from pathlib import Path

import pytest

from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.toolkit.simulation.config import load_config, merged
from fleetune.toolkit.simulation.config_copy import config_text

BASE = """
name = "fedlora"
artifact = "artifact"
rounds = 20
clients = 4
[data]
train = "train.jsonl"
test = "/data/test.jsonl"
[partition]
kind = "dirichlet"
devices = 20
[fleet.profiles]
pi-4 = 0.5
pi-5 = 0.5
[work]
steps = 10
[work.optimizer]
lr = 1e-3
[job]
strategy = "fedavg"
"""


@pytest.fixture
def base(tmp_path):
    path = tmp_path / "base.toml"
    path.write_text(BASE)
    return path


def arm(base, text):
    path = base.parent / "arms" / "arm.toml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(f'include = "../base.toml"\n{text}')
    return path


def test_the_structs_of_the_house_are_made_from_the_file(base):
    config = load_config(base)
    assert (config.job.job, config.job.rounds, config.job.clients, config.job.seed) == ("fedlora", 20, 4, 0)
    assert (config.work.steps, config.work.optimizer.lr) == (10, 1e-3)
    assert config.artifact == str(base.parent / "artifact")
    assert config.data.test == "/data/test.jsonl"


def test_an_arm_differs_from_what_it_includes_by_its_own_lines(base):
    path = arm(
        base, 'name = "suffix"\n[work.policy]\nname = "suffix"\ndrop = 0.5\n[fleet.profiles]\npi-5 = 0\n'
    )
    config = load_config(path)
    assert (config.name, config.work.policy.name, config.work.optimizer.lr) == ("suffix", "suffix", 1e-3)
    assert config.fleet.profiles == {"pi-4": 0.5, "pi-5": 0}
    assert config.data.train == str(path.parent / ".." / "train.jsonl"), (
        "from the folder of the file that says it"
    )


def test_later_includes_win_and_the_file_over_all_of_them(base):
    (base.parent / "more.toml").write_text("rounds = 7\nclients = 5\n")
    (base.parent / "both.toml").write_text('include = ["base.toml", "more.toml"]\nclients = 6\n')
    config = load_config(base.parent / "both.toml")
    assert (config.rounds, config.clients, config.job.clients) == (7, 6, 6)


def test_the_command_line_sets_over_the_file(base):
    config = load_config(
        base, ["seed=2", "work.policy.name = suffix", "work.policy.drop=0.25", "data.train=own.jsonl"]
    )
    assert (config.seed, config.job.seed) == (2, 2)
    assert (config.work.policy.name, config.work.policy.drop) == ("suffix", 0.25)
    assert config.data.train == "own.jsonl", "from the current folder"


def test_a_column_is_in_the_data_or_in_a_file_of_its_own(base):
    by = ["partition.kind=by", "partition.column=speaker"]
    assert load_config(base, by).column_file == base.parent / "train.jsonl"
    path = arm(base, '[partition]\nkind = "by"\ncolumn = "speaker"\nfile = "who.npz"\n')
    assert load_config(path).column_file == path.parent / "who.npz"


def test_a_merge_leaves_what_it_merges_alone():
    under, over = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"c": [2]}, "d": {"e": 1}}
    assert merged(under, over) == {"a": {"b": 1, "c": [2]}, "d": {"e": 1}}
    assert under == {"a": {"b": 1, "c": [1]}, "d": 1}


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("sed=1", "unknown key 'sed'; have: artifact, availability, cache, clients, data, "),
        ("work.polcy.name=full", "work: unknown key 'polcy'; have: batch_size, "),
        ("work.policy.nme=full", "work.policy: unknown key 'nme'; have: drop, "),
        ("work.seed=1", "work: unknown key 'seed'; have: "),
        ("job.rounds=1", "job: unknown key 'rounds'; have: compress_down, "),
        ("work.policy.name=half", "work.policy.name: no policy 'half'; have: bernoulli, "),
        ("job.strategy=mean", "job.strategy: no strategy 'mean'; have: "),
        ("partition.kind=iids", "partition.kind: no partition 'iids'; have: by, code, dirichlet, "),
        ("partition.kind=iid", ""),
        ("partition.classes=3", "kind 'dirichlet' has no use for classes; kinds that have: shards"),
        ("partition.devices=0", "partition: devices must be at least 1"),
        ("partition.alpha=0", "partition.alpha: alpha must be above 0, got 0"),
        ("partition.alpha=nan", "partition.alpha: alpha must be above 0, got nan"),
        ("partition.alpha=-1", "got -1"),
        ("rounds=1e300", "rounds = 1e+300: expected a whole number"),
        ("rounds=0", "rounds: rounds must be at least 1"),
        ("rounds=true", "rounds = True: expected a whole number"),
        ("workers=1025", "workers: workers must be at most 1024"),
        ("seed=-1", "seed: seed must be at least 0"),
        ("work=3", "work = 3: expected a table of batch_size, "),
        ("fleet.profiles.pi-9=1", "fleet.profiles: no profile 'pi-9'; have: jetson-nano, "),
        ("fleet.profiles.pi-4=-1", "fleet.profiles: shares [-1.0, 0.5]: expected numbers from 0, not all 0"),
        ("fleet.profiles.pi-4=nan", "fleet.profiles: shares [nan, 0.5]"),
        ("profiles.mine.active_w=3", "profiles.mine: needs gflops or slowdown, and not both"),
        ("profiles.mine.gflop=3", "profiles.mine: unknown key 'gflop'; have: "),
        ("profiles.mine.gflops=1e400", "profiles.mine.gflops: gflops must be at least 0, got inf"),
        ("network.model=4g", "network: no network '4g'; have: 3g, 5g, ethernet, lte, wifi"),
        ("networks.mine.sigma=1", "networks.mine: needs down_bytes_s"),
        ("availability.dropout=2", "availability.dropout: dropout must be at most 1"),
        ("availability.dropout=[0.1, 1.5]", "availability.dropout: dropout must be at most 1, got 1.5"),
        ("availability.dropout=[0.1, nan]", "availability.dropout: dropout must be at least 0, got nan"),
        ("availability.dropout=[]", "availability.dropout: an empty list"),
        ('availability.dropout=["a"]', "availability.dropout = ['a']: expected"),
        ("availability.on_share=0", "availability.on_share: on_share must be above 0"),
        ("name=a b", "name 'a b'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named_with_what_is_expected(base, override, said):
    if not said:
        assert load_config(base, [override])
        return
    with pytest.raises(ConfigError) as caught:
        load_config(base, [override])
    assert said in str(caught.value)
    assert str(base) in str(caught.value)


def test_all_of_it_is_told_at_once_and_one_unknown_name_is_an_unknown_name(base):
    with pytest.raises(ConfigError) as caught:
        load_config(base, ["rounds=0", "work.steps=x", "dat=1", "data.tst=1"])
    assert all(
        word in str(caught.value)
        for word in ("rounds", "work.steps = 'x'", "'dat'", "data: unknown key 'tst'")
    )
    with pytest.raises(UnknownName):
        load_config(base, ["dat=1"])


@pytest.mark.parametrize("override", ["seed", "=1", ".seed=1", "work..steps=1"])
def test_an_override_that_is_none_is_refused(base, override):
    with pytest.raises(ConfigError, match="expected key=value"):
        load_config(base, [override])


def test_a_needed_key_is_asked_for(tmp_path):
    (tmp_path / "c.toml").write_text('name = "a"\n[data]\n')
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "c.toml")
    assert all(
        f"needs {word}" in str(caught.value) for word in ("artifact", "rounds", "partition", "train", "test")
    )


def test_a_file_that_includes_itself_or_what_is_not_there_is_refused(tmp_path):
    (tmp_path / "a.toml").write_text('include = "b.toml"')
    (tmp_path / "b.toml").write_text('include = "a.toml"')
    with pytest.raises(ConfigError, match=r"a\.toml: includes itself, by way of b\.toml"):
        load_config(tmp_path / "a.toml")
    (tmp_path / "b.toml").write_text('include = "none.toml"')
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read as TOML: No such file"):
        load_config(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("include = 3")
    with pytest.raises(ConfigError, match="include = 3: expected a file name"):
        load_config(tmp_path / "a.toml")


def test_a_loop_of_links_is_a_file_that_cannot_be_read(tmp_path):
    path = tmp_path / "a.toml"
    path.symlink_to(path)
    with pytest.raises(ConfigError, match=r"a\.toml: cannot be read as TOML: .*[Ss]ymbolic links"):
        load_config(path)


def test_a_copy_kept_elsewhere_reads_as_the_same_whatever_path_it_names(tmp_path, monkeypatch):
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    own = 'kind = "code"\ncode = "shares.py:shares"\ndevices = 20'
    Path("own.toml").write_text(BASE.replace('kind = "dirichlet"\ndevices = 20', own), encoding="utf-8")
    copy = tmp_path / "there" / "config.toml"
    copy.write_text(config_text(load_config("own.toml")), encoding="utf-8")
    found = load_config(copy)
    assert found.partition.code == str(tmp_path / "here" / "shares.py:shares")
    assert config_text(found) == copy.read_text(encoding="utf-8")
