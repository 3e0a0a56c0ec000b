import sqlite3

import pytest
from paths import DATA
from rounds_by_hand import job

from fleetune.broker.store.kept_versions import Kept, read_version
from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.contracts.run_file import LEDGER
from fleetune.device_runtime.errors import ConfigError, StateError


def test_versions_are_read_beside_an_aggregator_at_work(tmp_path):
    with Ledger(tmp_path, job()) as ledger:
        with pytest.raises(ConfigError, match="has made no version yet"):
            read_version(tmp_path)
        ledger.add_version(0, b"zero", round_number=0)
        ledger.add_version(1, b"one", round_number=1, state=b"momentum")
        half_written = tmp_path / "versions" / ".00002.safetensors.part"
        half_written.write_bytes(b"tw")
        assert read_version(tmp_path) == Kept(1, b"one", job().artifact)
        assert read_version(tmp_path, 0).content == b"zero"
        assert half_written.exists()
        ledger.add_version(2, b"two", round_number=2)
        assert read_version(tmp_path).version == 2


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no job of an aggregator here"):
        read_version(tmp_path)
    with Ledger(tmp_path, job()) as ledger:
        ledger.add_version(0, b"zero", round_number=0)
        ledger.add_version(1, b"one", round_number=1)
    with pytest.raises(ConfigError, match="no version 5; there are 0 to 1"):
        read_version(tmp_path, 5)
    with pytest.raises(ConfigError, match="no version -1"):
        read_version(tmp_path, -1)
    (tmp_path / "versions" / "00000.safetensors").write_bytes(b"more")
    (tmp_path / "versions" / "00001.safetensors").unlink()
    for version, words in ((0, "SHA-256"), (1, "cannot be read")):
        with pytest.raises(StateError, match=words):
            read_version(tmp_path, version)
    (tmp_path / LEDGER).write_bytes(b"no database at all" * 100)
    with pytest.raises(StateError, match="not a ledger"):
        read_version(tmp_path)


def test_a_ledger_of_0_1_0_gives_its_versions(tmp_path):
    old = DATA / "ledger_format_1"
    with sqlite3.connect(tmp_path / LEDGER) as sql:
        sql.executescript((old / "ledger.sql").read_text())
    sql.close()
    (tmp_path / "versions").symlink_to(old / "versions")
    kept = read_version(tmp_path)
    assert kept.content == (old / "versions" / f"{kept.version:05d}.safetensors").read_bytes()
