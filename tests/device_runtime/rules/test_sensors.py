from datetime import datetime

import msgspec
import pytest
from pretended import PretendedSystem

from fleetune.device_runtime.rules.rules import JUDGES, Reading, Rules
from fleetune.device_runtime.rules.sensors import Sensors, sensors_of


@pytest.fixture
def system(tmp_path):
    return PretendedSystem(tmp_path / "root")


def read(system, name, **options):
    reading = Sensors(system.root, wanted=[name], **options).read()
    return getattr(reading, name), reading.doubts.get(name, "")


def test_the_hottest_zone_counts(system):
    system.zone(41.5)
    system.zone(66.25, index=1, kind="gpu-thermal")
    system.write("sys/class/thermal/cooling_device0/type", "fan")
    assert read(system, "temperature") == (66.25, "")


def test_named_zones_alone_count_by_type_or_folder(system):
    system.zone(45, kind="CPU-therm")
    system.zone(100, index=1, kind="PMIC-Die")
    assert read(system, "temperature", zones=["CPU-therm"]) == (45.0, "")
    assert read(system, "temperature", zones=["thermal_zone1"]) == (100.0, "")
    value, doubt = read(system, "temperature", zones=["CPU-therm", "gpu"])
    assert value == 45.0
    assert doubt == "no thermal zone gpu; listed: CPU-therm, PMIC-Die"
    assert read(system, "temperature", zones=["gpu"])[0] is None


@pytest.mark.parametrize("lie", ["0", "-274000", "999000", "45", "nan", "inf", "hot", "", "12 34"])
def test_an_implausible_zone_is_missing_and_the_others_count(system, lie):
    system.raw_zone(lie)
    value, doubt = read(system, "temperature")
    assert value is None
    assert doubt == f"thermal_zone0 (cpu-thermal) says {lie!r}"
    system.zone(50, index=1, kind="soc")
    assert read(system, "temperature") == (50.0, doubt)


@pytest.mark.parametrize("degrees", [-20.0, 1.0, 45.0, 124.9])
def test_a_plausible_zone_is_believed(system, degrees):
    system.zone(degrees)
    assert read(system, "temperature") == (degrees, "")


def test_a_zone_that_vanishes_between_two_readings_is_missing(system):
    system.zone(50)
    sensors = Sensors(system.root, wanted=["temperature"])
    assert sensors.read().temperature == 50.0
    system.remove("sys/class/thermal/thermal_zone0/temp")
    assert sensors.read() == Reading(doubts={"temperature": "thermal_zone0 (cpu-thermal) says ''"})
    system.remove("sys/class/thermal")
    assert sensors.read().doubts == {"temperature": "no thermal zone at all; listed: none"}
    system.zone(51)
    assert sensors.read() == Reading(temperature=51.0, doubts={})


@pytest.mark.parametrize(
    ("supplies", "expected"),
    [
        ([("AC", {"type": "Mains", "online": 1})], "mains"),
        ([("AC", {"type": "Mains", "online": 0})], "battery"),
        ([("usb", {"type": "USB", "online": 2})], "mains"),
        (
            [("AC", {"type": "Mains", "online": 1}), ("BAT0", {"type": "Battery", "status": "Discharging"})],
            "mains",
        ),
        (
            [("AC", {"type": "Mains", "online": 0}), ("BAT0", {"type": "Battery", "status": "Discharging"})],
            "battery",
        ),
        (
            [("usb", {"type": "USB", "online": 0}), ("BAT0", {"type": "Battery", "status": "Charging"})],
            "mains",
        ),
        ([("BAT0", {"type": "Battery", "status": "Full"})], "mains"),
        ([("BAT0", {"type": "Battery", "status": "Not charging"})], "mains"),
        ([("ups", {"type": "UPS", "status": "Discharging"})], "battery"),
        ([("BAT0", {"type": "Battery", "status": "Unknown"})], None),
        ([("AC", {"type": "Mains", "online": 7})], None),
        ([("mouse", {"type": "Battery", "status": "Discharging", "scope": "Device"})], None),
        ([("BAT1", {"type": "Battery", "status": "Discharging", "present": 0})], None),
        ([], None),
    ],
)
def test_where_the_power_comes_from(system, supplies, expected):
    for name, files in supplies:
        system.supply(name, **files)
    value, doubt = read(system, "power")
    assert value == expected
    assert bool(doubt) is (expected is None)


@pytest.mark.parametrize(
    ("supplies", "expected", "said"),
    [
        ([("BAT0", {"capacity": 57})], 57.0, ""),
        ([("BAT0", {"capacity": 20}), ("BAT1", {"capacity": 90})], 55.0, ""),
        ([("BAT0", {"capacity": 0})], 0.0, ""),
        ([("BAT0", {"capacity": 101})], None, "BAT0 says 101 %"),
        ([("BAT0", {"capacity": -1})], None, "BAT0 says -1 %"),
        ([("BAT0", {"capacity": "nan"})], None, "BAT0 says nan %"),
        ([("BAT0", {"status": "Full"})], None, "BAT0 says nan %"),
        ([("BAT0", {"capacity": 255}), ("BAT1", {"capacity": 80})], 80.0, "BAT0 says 255 %"),
        ([("mouse", {"capacity": 3, "scope": "Device"})], None, "no battery is listed"),
        ([], None, "no battery is listed"),
    ],
)
def test_charge_of_the_batteries(system, supplies, expected, said):
    for name, files in supplies:
        system.supply(name, type="Battery", **files)
    assert read(system, "battery") == (expected, said)


def loads(system, *times, **options):
    """Readings of the load, one after each state of the counters."""
    sensors, found = Sensors(system.root, wanted=["load"], **options), []
    for time in times:
        system.cpu_time(**time)
        found.append(sensors.read().load)
    return found


def test_the_load_is_what_others_take_and_not_our_own(system):
    system.load_average(0.5)
    first, busy_with_us, busy_with_others, idle = loads(
        system,
        {"busy": 1000, "idle": 1000, "own": 0},
        {"busy": 2000, "idle": 1000, "own": 1000},
        {"busy": 2900, "idle": 1100, "own": 1250},
        {"busy": 2900, "idle": 2100, "own": 1250},
    )
    assert first == 0.25, "the load average by core, before there is a difference"
    assert (busy_with_us, busy_with_others, idle) == (0.0, 0.65, 0.0)


def test_too_little_time_tells_nothing_and_adds_up(system):
    system.load_average(1.0)
    found = loads(
        system,
        {"busy": 100, "idle": 100, "own": 0},
        {"busy": 130, "idle": 100, "own": 0},
        {"busy": 160, "idle": 140, "own": 0},
    )
    assert found == [0.5, 0.5, 0.6]


def test_counters_that_jump_back_leave_the_load_as_it_was(system):
    system.load_average(0)
    found = loads(
        system,
        {"busy": 1000, "idle": 1000, "own": 0},
        {"busy": 1800, "idle": 1200, "own": 0},
        {"busy": 10, "idle": 10, "own": 0},
        {"busy": 60, "idle": 60, "own": 0},
    )
    assert found == [0.0, 0.8, 0.8, 0.5]


@pytest.mark.parametrize(("average", "expected"), [("nan", 0.0), ("-1", 0.0), ("", 0.0), ("64.0", 1.0)])
def test_an_implausible_load_average_is_no_load_until_there_is_a_difference(system, average, expected):
    system.load_average(average)
    assert loads(system, {"busy": 1, "idle": 1, "own": 0}) == [expected]


@pytest.mark.parametrize("lost", ["proc/stat", "proc/self/stat"])
def test_a_load_without_counters_is_missing(system, lost):
    system.load_average(0.5)
    system.cpu_time(busy=1, idle=1, own=1)
    system.remove(lost)
    assert read(system, "load") == (None, "/proc/stat or /proc/self/stat cannot be read")
    system.write(lost, "cpu x y z")
    assert read(system, "load")[0] is None


def test_the_time_of_day_is_the_local_minute_and_an_unset_clock_is_missing(system):
    assert read(system, "hours", wall=lambda: datetime(2026, 11, 21, 23, 59, 59)) == (1439, "")
    assert read(system, "hours", wall=lambda: datetime(2026, 11, 22)) == (0, "")
    assert read(system, "hours", wall=lambda: datetime(1970, 1, 1, 2)) == (None, "the clock says 1970-01-01")


def test_only_what_the_rules_ask_is_read(system):
    rules = msgspec.convert({"temperature": {"max_c": 70, "zones": ["soc"]}, "root": str(system.root)}, Rules)
    system.zone(90)
    system.zone(40, index=1, kind="soc")
    assert sensors_of(rules).read() == Reading(temperature=40.0, doubts={})


def test_an_empty_system_is_missing_altogether_and_this_one_is_read_without_an_error(system):
    found = Sensors(system.root).read()
    assert found[:-1] == (None, None, None, None, found.hours, None)
    assert set(found.doubts) == set(JUDGES) - {"hours"}
    here = Sensors().read()
    assert here.battery is None or 0 <= here.battery <= 100
    assert here.load is None or 0 <= here.load <= 1
