"""State on a disk that is full or read-only: one line that says where, and the same bits once it is whole again."""

import functools
import tempfile
from pathlib import Path

import bad_disk
import fleet
import pytest

from fleetune.broker.store.ledger import Ledger
from fleetune.device_runtime.agent.outbox_file import open_outbox
from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.files import alone_in

PLACES = {"aggregator": "/aggregator", "device": "/device-"}
REASONS = {"full": ("No space left on device", "disk is full"), "read-only": ("Read-only file system",)}


@functools.cache
def calm():
    with tempfile.TemporaryDirectory() as folder:
        world = bad_disk.job(Path(folder) / "a", Path(folder) / "d").run()
        return bad_disk.versions(world)


@pytest.mark.skipif(not bad_disk.can_mount(), reason="nothing may be mounted here")
@pytest.mark.parametrize(
    ("who", "how", "turn"),
    [
        ("aggregator", "full", 5),
        ("device", "full", 8),
        *(
            pytest.param(who, how, turn, marks=pytest.mark.slow)
            for who in PLACES
            for how in REASONS
            for turn in (1, 3, 12)
        ),
    ],
)
def test_a_spoilt_disk_is_one_line_and_nothing_is_lost(tmp_path, who, how, turn):
    found = bad_disk.run(tmp_path, who, how, turn)
    assert found["said"]
    for said in found["said"]:
        assert said.startswith(f"StateError: {tmp_path}{PLACES[who]}")
        assert any(reason in said for reason in REASONS[how])
        assert "\n" not in said
    assert found["versions"] == calm()


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path):
    place = tmp_path / "taken"
    place.write_text("mine")
    with pytest.raises(StateError, match=r"taken: cannot be written: Not a directory"):
        Ledger(place, fleet.settings_of())
    with pytest.raises(StateError, match=r"taken.*: Not a directory"), alone_in(place, "another"):
        pass
    with pytest.raises(StateError, match=r"taken.*: Not a directory"):
        open_outbox(place / "outbox.sqlite")
    assert place.read_text() == "mine"
