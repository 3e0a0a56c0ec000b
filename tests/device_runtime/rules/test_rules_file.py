import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.rules.rules import Hours, Network, Rules, Temperature
from fleetune.device_runtime.rules.rules_file import load_rules

FULL = """
nice = 10
period_s = 2
resume_after_s = 30.5
root = "/host"
power = { allowed = ["mains"], on_missing = "deny" }
battery = { min_percent = 50, margin_percent = 10 }
temperature = { max_c = 75, margin_c = 5, zones = ["cpu-thermal"] }
load = { max_share = 0.5 }
hours = { windows = ["22:00-06:00", "12:30-13:30"] }
network = { allowed = ["wired"] }
"""


def test_a_table_in_a_file_is_that_table_under_rules_and_that_mapping(tmp_path):
    (tmp_path / "flat.toml").write_text(FULL)
    (tmp_path / "fleet.toml").write_text("[device]\nthreads = 2\n[rules]" + FULL)
    rules = load_rules(tmp_path / "flat.toml")
    assert rules == load_rules(str(tmp_path / "fleet.toml"))
    assert (rules.nice, rules.period_s, rules.resume_after_s, rules.root) == (10, 2.0, 30.5, "/host")
    assert rules.power.on_missing == "deny"
    assert rules.temperature == Temperature(max_c=75.0, zones=("cpu-thermal",))
    assert rules.hours == Hours(windows=("22:00-06:00", "12:30-13:30"))
    assert load_rules({"network": {"allowed": ["wired"]}}).network == Network(allowed=("wired",))


def test_none_and_an_empty_table_are_no_rules(tmp_path):
    (tmp_path / "empty.toml").write_text("")
    assert load_rules(None) == load_rules({}) == load_rules(tmp_path / "empty.toml") == Rules()
    assert Rules().asked == {}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        (
            {"tempo": 1},
            "rules: unknown key 'tempo'; have: battery, hours, load, network, nice, period_s, power, ",
        ),
        ({"load": {"max": 1}}, "rules.load: unknown key 'max'; have: margin_share, max_share, on_missing"),
        ({"temperature": {}}, "rules.temperature: needs max_c"),
        (
            {"temperature": 70},
            "rules.temperature = 70: expected a table of margin_c, max_c, on_missing, zones",
        ),
        ({"temperature": {"max_c": 126}}, "rules.temperature.max_c = 126: expected a number from 20 to 125"),
        ({"temperature": {"max_c": 0}}, "expected a number from 20 to 125"),
        ({"temperature": {"max_c": float("nan")}}, "max_c = nan: expected a number from 20 to 125"),
        ({"temperature": {"max_c": float("inf")}}, "max_c = inf: expected a number from 20 to 125"),
        ({"temperature": {"max_c": "70"}}, "max_c = '70': expected a number from 20 to 125"),
        ({"temperature": {"max_c": True}}, "max_c = True: expected a number from 20 to 125"),
        ({"temperature": {"max_c": 70, "zones": "cpu"}}, "zones = 'cpu': expected a list: a text"),
        ({"battery": {"min_percent": 101}}, "min_percent = 101: expected a number from 0 to 100"),
        ({"battery": {"min_percent": 5, "margin_percent": -1}}, "expected a number from 0 to 50"),
        ({"load": {"max_share": 50}}, "rules.load.max_share = 50: expected a number from 0.01 to 1"),
        ({"load": {"max_share": 0.1}}, "rules.load: margin_share 0.1 must be below max_share 0.1"),
        (
            {"power": {"allowed": ["sun"]}},
            "allowed = ['sun']: expected a list of at least one: battery, mains",
        ),
        ({"power": {"allowed": []}}, "expected a list of at least one: battery, mains"),
        ({"power": {"on_missing": "ask"}}, "rules.power.on_missing = 'ask': expected allow, deny"),
        ({"network": {"allowed": ["wifi"]}}, "at least one: cellular, none, other, wired, wireless"),
        (
            {"hours": {"windows": ["22-6"]}},
            "expected a list of at least one: 'HH:MM-HH:MM' from 00:00 to 24:00",
        ),
        ({"hours": {"windows": ["22:00-24:01"]}}, "'HH:MM-HH:MM' from 00:00 to 24:00"),
        ({"hours": {"windows": ["24:00-06:00"]}}, "'HH:MM-HH:MM' from 00:00 to 24:00"),
        ({"hours": {"windows": ["06:00-06:00"]}}, "rules.hours.windows: '06:00-06:00' is empty; all day is"),
        ({"nice": -5}, "rules.nice = -5: expected a whole number from 0 to 19"),
        ({"nice": 20}, "expected a whole number from 0 to 19"),
        ({"nice": 1.5}, "expected a whole number from 0 to 19"),
        ({"period_s": -1}, "rules.period_s = -1: expected a number from 0 to 3600"),
        ({"resume_after_s": 1e9}, "expected a number from 0 to 86400"),
        ({"root": 1}, "rules.root = 1: expected a text"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_expected(table, said):
    with pytest.raises(ConfigError) as caught:
        load_rules(table)
    assert said in str(caught.value)


def test_all_mistakes_are_told_at_once_with_the_file(tmp_path):
    path = tmp_path / "rules.toml"
    path.write_text('nice = 30\nwind = 3\n[battery]\nmin_percent = "full"\n')
    with pytest.raises(ConfigError) as caught:
        load_rules(path)
    assert str(caught.value).startswith(f"{path}: rules")
    assert all(word in str(caught.value) for word in ("'wind'", "nice = 30", "battery.min_percent = 'full'"))


@pytest.mark.parametrize(
    "content", [b"nice =", b"\xff\xfe", b"nice = 1\nnice = 2", b"rules = 5", b"[[rules]]"]
)
def test_what_is_no_table_is_refused_with_the_file(tmp_path, content):
    path = tmp_path / "rules.toml"
    path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"rules\.toml: (cannot be read as TOML|rules = .*expected a table)"
    ):
        load_rules(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read as TOML: No such file"):
        load_rules(tmp_path / "none.toml")
