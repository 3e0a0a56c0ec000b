"""The owner's record: nothing twice, nothing lost, never larger than two parts."""

import pytest

from fleetune.device_runtime.files import DiskFiles
from fleetune.device_runtime.terms import left
from fleetune.device_runtime.terms.left import NEWEST, OLDER, Left, Record
from fleetune.device_runtime.terms.words import left_in_words


def line(number, **changes):
    fields = {
        "when": "2027-01-15T08:00:00Z",
        "job": "home",
        "round": number,
        "task_id": f"t{number}",
        "kind": "update",
    }
    return Left(**{**fields, **changes})  # fmt: skip


@pytest.fixture
def files(tmp_path):
    return DiskFiles(tmp_path)


def test_a_line_is_written_once_and_gets_its_verdict(files):
    for _ in range(2):
        Record(files).add(line(1, samples=32, bytes=900, tensors={"lora": 2}, steps=4, scale=0.5))
    Record(files).add(line(1, kind="", verdict="accepted"))
    (found,) = Record(files).newest(5)
    assert left_in_words(found) == (
        "2027-01-15T08:00:00Z job home round 1: update of 32 samples, 4 steps, 900 bytes, 2 lora, "
        "clipped to 0.5 of its change, accepted"
    )
    assert files.read(NEWEST).count(b"\n") == 2


def test_a_torn_line_costs_itself_alone(files):
    Record(files).add(line(1))
    files.append(NEWEST, b'{"when":"2027-01')
    Record(files).add(line(2))
    assert [found.round for found in Record(files).newest(5)] == [1, 2]


def test_it_is_two_parts_at_most(files, monkeypatch):
    monkeypatch.setattr(left, "SIZE_MAX", 500)
    for number in range(30):
        Record(files).add(line(number))
    assert files.names() == [OLDER, NEWEST]
    assert max(len(files.read(name)) for name in files.names()) < 700
    assert [found.round for found in Record(files).newest(4)] == [26, 27, 28, 29]
    assert Record(files).newest(0) == []
