"""A ledger of an earlier release: rules that entered later stay off in its job, in every later start too, and that is told."""

import json
import shutil
import sqlite3

import pytest
from fleet import first_adapter, settings_of
from msgspec.structs import fields, replace
from paths import DATA

from fleetune.broker.jobs.settings import Job
from fleetune.broker.store.earlier import LATER
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.arrays import to_bytes
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import ConfigError

SETTINGS = settings_of(rounds=3, clients=5, min_clients=5)


def begun_without(folder, *names):
    """A ledger with a version, whose settings say nothing of these."""
    folder.mkdir()
    with Ledger(folder, SETTINGS) as ledger:
        ledger.add_version(0, to_bytes(first_adapter(4)), round_number=0)
    said = {name: value for name, value in settings_in(folder).items() if name not in names}
    with sqlite3.connect(folder / LEDGER) as sql:
        sql.execute("UPDATE job SET settings = ?", (json.dumps(said),))
    sql.close()
    return folder


def settings_in(folder):
    with sqlite3.connect(folder / LEDGER) as sql:
        (text,) = sql.execute("SELECT settings FROM job").fetchone()
    sql.close()
    return json.loads(text)


@pytest.mark.parametrize("name", LATER)
def test_a_rule_that_the_job_began_without_stays_off_and_is_told(tmp_path, name):
    folder = begun_without(tmp_path / "run", name)
    for settings in (SETTINGS, SETTINGS, replace(SETTINGS, rounds=9), replace(SETTINGS, rounds=9)):
        with Ledger(folder, settings) as ledger:
            assert ledger.begun.settings == replace(settings, **{name: LATER[name]})
            assert f"without --{name.replace('_', '-')}" in ledger.begun.said
        assert name not in settings_in(folder)


def test_a_job_that_began_with_all_of_them_has_them_and_nothing_is_told(tmp_path):
    with Ledger(begun_without(tmp_path / "run"), SETTINGS) as ledger:
        assert (ledger.begun.settings, ledger.begun.said, ledger.begun.is_earlier) == (SETTINGS, "", False)


def test_a_new_job_has_them(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with Ledger(folder, SETTINGS) as ledger:
        assert (ledger.begun.settings, ledger.begun.said) == (SETTINGS, "")


def test_one_that_is_asked_for_by_a_value_of_its_own_is_another_job(tmp_path):
    folder = begun_without(tmp_path / "run", "heading")
    with pytest.raises(ConfigError, match=r"heading: 0\.5, was 0\.0"):
        Ledger(folder, replace(SETTINGS, heading=0.5))


def test_strikes_may_differ_at_each_start_and_are_on_when_asked_for(tmp_path):
    folder = begun_without(tmp_path / "run", "strikes")
    with Ledger(folder, replace(SETTINGS, strikes=5)) as ledger:
        assert (ledger.begun.settings.strikes, ledger.begun.said) == (5, "")


def test_what_release_0_1_0_wrote_goes_on_without_any_of_them(tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(DATA / "ledger_format_1", folder)
    with sqlite3.connect(folder / LEDGER) as sql:
        sql.executescript((folder / "ledger.sql").read_text())
    sql.close()
    old = settings_of(rounds=2, clients=2, min_clients=2, strategy="fedavgm")
    with Ledger(folder, old) as ledger:
        assert ledger.begun.settings == replace(old, **LATER)
        assert ledger.begun.is_earlier


NEUTRAL = {
    "dp",
    "secure",
    "lazy",
    "mask_every",
    "head_start",
    "traffic",
    "configurator",
    "down_codec",
    "selection",
    "strategy",
}
"""Added since 0.1.0 or there from the start: by default they do nothing, or did it then."""
SIZES_OF_OTHERS = {
    "down_ratio", "down_bits", "mask_share", "compress_down", "compress_up", "compress_up_min", "explore", "outliers",
    "secure_bits", "secure_range", "secure_weight_bits", "secure_threshold", "secure_neighbours",
}  # fmt: skip
"""Which mean something only beside a strategy, planner, codec or sum that is not the default."""
FIRST = {"job", "rounds", "clients", "min_clients", "seed", "evaluate_every"}


def test_every_setting_of_a_job_is_placed():
    """A new one fails here: if it acts by default it belongs in LATER, so that no running job takes it silently."""
    assert {field.name for field in fields(Job)} == {*LATER, *NEUTRAL, *SIZES_OF_OTHERS, *FIRST}
