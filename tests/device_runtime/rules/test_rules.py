import msgspec
import pytest

from fleetune.device_runtime.rules.rules import JUDGES, Reading, Rules, reasons
from fleetune.device_runtime.rules.sensors import SENSORS

DAY = 24 * 60


def rules_of(**tables):
    return msgspec.convert(tables, Rules)


def at(clock):
    hours, minutes = clock.split(":")
    return int(hours) * 60 + int(minutes)


@pytest.mark.parametrize(
    ("rule", "value", "said"),
    [
        ({"power": {}}, "mains", ""),
        ({"power": {}}, "battery", "power comes from battery, not mains"),
        ({"power": {"allowed": ["mains", "battery"]}}, "battery", ""),
        ({"battery": {"min_percent": 40}}, 40.0, ""),
        ({"battery": {"min_percent": 40}}, 39.0, "battery at 39 % is below 40 %"),
        ({"battery": {"min_percent": 100}}, 100.0, ""),
        ({"temperature": {"max_c": 70}}, 70.0, ""),
        ({"temperature": {"max_c": 70}}, 70.1, "temperature 70.1 C is above 70 C"),
        ({"load": {"max_share": 0.5}}, 0.5, ""),
        ({"load": {"max_share": 0.5}}, 0.75, "others' load 0.75 is above 0.50"),
        ({"network": {}}, "wired", ""),
        ({"network": {}}, "wireless", ""),
        ({"network": {}}, "cellular", "network is cellular, not wired or wireless"),
        ({"network": {}}, "none", "network is none, not wired or wireless"),
        ({"network": {"allowed": ["none"]}}, "none", ""),
    ],
)
def test_each_rule_by_its_value(rule, value, said):
    (name,) = rule
    found = reasons(rules_of(**rule), Reading(**{name: value}))
    assert found == ({name: said} if said else {})


@pytest.mark.parametrize(
    ("windows", "clock", "is_open"),
    [
        (["22:00-06:00"], "21:59", False),
        (["22:00-06:00"], "22:00", True),
        (["22:00-06:00"], "23:59", True),
        (["22:00-06:00"], "00:00", True),
        (["22:00-06:00"], "05:59", True),
        (["22:00-06:00"], "06:00", False),
        (["09:00-17:30"], "08:59", False),
        (["09:00-17:30"], "09:00", True),
        (["09:00-17:30"], "17:29", True),
        (["09:00-17:30"], "17:30", False),
        (["12:00-13:00", "20:00-24:00"], "23:59", True),
        (["12:00-13:00", "20:00-24:00"], "00:00", False),
        (["00:00-24:00"], "00:00", True),
        (["00:00-24:00"], "23:59", True),
        (["23:00-00:00"], "23:30", True),
        (["23:00-00:00"], "00:00", False),
    ],
)
def test_windows_of_the_day(windows, clock, is_open):
    found = reasons(rules_of(hours={"windows": windows}), Reading(hours=at(clock)))
    assert found == ({} if is_open else {"hours": f"{clock} is outside {' and '.join(windows)}"})


def test_a_window_across_midnight_is_the_complement_of_the_day_between():
    night, day = (rules_of(hours={"windows": [w]}) for w in ("22:15-06:45", "06:45-22:15"))
    for minute in range(DAY):
        reading = Reading(hours=minute)
        assert bool(reasons(night, reading)) != bool(reasons(day, reading)), minute


@pytest.mark.parametrize(
    ("rule", "value", "is_held"),
    [
        ({"battery": {"min_percent": 40, "margin_percent": 10}}, 49.0, True),
        ({"battery": {"min_percent": 40, "margin_percent": 10}}, 50.0, False),
        ({"battery": {"min_percent": 98, "margin_percent": 10}}, 99.0, True),
        ({"battery": {"min_percent": 98, "margin_percent": 10}}, 100.0, False),
        ({"temperature": {"max_c": 70, "margin_c": 8}}, 63.0, True),
        ({"temperature": {"max_c": 70, "margin_c": 8}}, 62.0, False),
        ({"load": {"max_share": 0.5, "margin_share": 0.25}}, 0.26, True),
        ({"load": {"max_share": 0.5, "margin_share": 0.25}}, 0.25, False),
    ],
)
def test_a_rule_that_forbade_it_asks_for_its_margin_and_no_other_rule_does(rule, value, is_held):
    (name,) = rule
    reading = Reading(**{name: value})
    assert reasons(rules_of(**rule), reading) == {}
    assert bool(reasons(rules_of(**rule), reading, held=[name])) is is_held
    assert reasons(rules_of(**rule), reading, held=["power"]) == {}


def test_what_is_waited_for_is_told():
    rules = rules_of(temperature={"max_c": 70}, load={"max_share": 0.5})
    found = reasons(rules, Reading(temperature=66.0, load=0.45), held=["temperature", "load"])
    assert found == {
        "temperature": "temperature 66.0 C is not yet down to 65 C",
        "load": "others' load 0.45 is not yet down to 0.40",
    }


@pytest.mark.parametrize("missing", [None, float("nan")])
@pytest.mark.parametrize(
    "rule",
    [
        {"battery": {"min_percent": 40}},
        {"temperature": {"max_c": 70}},
        {"load": {"max_share": 0.5}},
    ],
)
def test_a_missing_sensor_allows_unless_the_rule_says_deny(rule, missing):
    (name,) = rule
    reading = Reading(**{name: missing}, doubts={name: "it vanished"})
    assert reasons(rules_of(**rule), reading) == {}
    denying = {name: {**rule[name], "on_missing": "deny"}}
    assert reasons(rules_of(**denying), reading) == {name: f"{name} is unknown (it vanished)"}


def test_on_missing_is_chosen_by_rule():
    rules = rules_of(power={"on_missing": "deny"}, network={}, hours={"windows": ["01:00-02:00"]})
    assert reasons(rules, Reading()) == {"power": "power is unknown (no sensor)"}


def test_all_that_forbids_is_told_and_no_rule_asks_nothing():
    rules = rules_of(power={}, temperature={"max_c": 70}, load={"max_share": 0.5})
    reading = Reading(power="battery", temperature=80.0, load=0.2, battery=1.0, network="none")
    assert list(reasons(rules, reading)) == ["power", "temperature"]
    assert reasons(Rules(), reading) == {}


def test_every_rule_has_a_judge_a_sensor_and_a_place_in_table_and_reading():
    assert list(JUDGES) == list(SENSORS)
    assert set(JUDGES) <= set(Rules.__struct_fields__)
    assert set(Reading._fields) - set(JUDGES) == {"doubts"}
