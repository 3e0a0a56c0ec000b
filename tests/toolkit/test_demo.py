import contextlib
import sys
import threading
import time
from pathlib import Path

import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit import processes as fleets
from fleetune.toolkit.demo import MARK, demo
from fleetune.toolkit.processes import DeviceDied, fleet


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Let a fleet start a script in the place of ``fleetune device``."""

    def replace(script):
        (tmp_path / "interpreter").write_text(f"#!/bin/sh\nexec {sys.executable} -u -c '{script}'\n")
        (tmp_path / "interpreter").chmod(0o755)
        monkeypatch.setattr(fleets.sys, "executable", str(tmp_path / "interpreter"))

    return replace


def is_alive(process):
    return Path(f"/proc/{process.pid}").exists()


def test_who_ends_by_itself_has_a_report(stand_in, tmp_path):
    stand_in('print("noise"); print("{\\"steps\\": 3}")')
    with fleet() as members:
        members.start("a", tmp_path / "a", [])
        members.wait(20)
        assert members.members[0].report() == {"steps": 3}


def test_whoever_dies_is_named_with_its_last_words(stand_in, tmp_path):
    stand_in('import sys; sys.stderr.write("first\\nfleetune: it hurts\\n"); sys.exit(1)')
    with fleet() as members:
        members.start("a", tmp_path / "a", [])
        with pytest.raises(DeviceDied, match="device a ended with 1: fleetune: it hurts"):
            members.wait(20)


def test_nobody_outlives_the_block(stand_in, tmp_path):
    stand_in("import time; time.sleep(60)")
    with contextlib.suppress(KeyboardInterrupt), fleet() as members:
        members.start("a", tmp_path / "a", [])
        members.start("b", tmp_path / "b", [])
        raise KeyboardInterrupt
    assert len(members.members) == 2
    assert not any(is_alive(member.process) for member in members.members)


def test_who_does_not_listen_is_killed(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(fleets, "_GRACE_S", 0.2)
    stand_in("import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1); time.sleep(60)")
    with fleet() as members:
        members.start("a", tmp_path / "a", [])
        _until(lambda: (tmp_path / "a" / "output.txt").read_text() == "1\n")
    assert members.members[0].process.returncode == -9


def test_waiting_has_an_end(stand_in, tmp_path):
    stand_in("import time; time.sleep(60)")
    with fleet() as members:
        members.start("a", tmp_path / "a", [])
        with pytest.raises(DeviceDied, match="did not end within"):
            members.wait(0.1)


def test_a_folder_of_somebody_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not delete")
    with pytest.raises(ConfigError, match="not empty and was not made by a demo"):
        demo(out=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.slow
def test_a_small_demo_of_ones_own_data_from_end_to_end(tmp_path):
    """Real export, server, aggregator and processes, over the remains of an earlier demo."""
    (tmp_path / "out" / "run").mkdir(parents=True)
    (tmp_path / "out" / "run" / "ledger.sqlite").write_text("of another job")
    (tmp_path / "out" / MARK).write_text("{}")
    lines = [
        f'{{"text": "{"good" if i % 2 else "bad"} thing number {i}", "label": {i % 2}}}\n' for i in range(60)
    ]
    (tmp_path / "own.jsonl").write_text("".join(lines))
    events: list[object] = []
    threads = _count_threads()
    report = demo(
        data=tmp_path / "own.jsonl", rounds=2, devices=2, out=tmp_path / "out", on_event=events.append
    )
    assert report.rounds == 2
    assert [event.round for event in events if not isinstance(event, str)] == [0, 1, 2]
    assert report.mean_active_layers == 6
    num_parameters = (
        6 * 2 * 2 * 8 * 384 + 2 * 384 + 2
    )  # layers x (query, value) x (A, B) x rank x width; head
    assert 4 * 2 * num_parameters < report.bytes_up < 1.05 * 4 * 2 * num_parameters
    assert (Path(report.adapter) / "adapter_model.safetensors").is_file()
    assert (tmp_path / "out" / MARK).is_file()
    _until(lambda: _count_threads() <= threads)


def _until(condition, timeout_s=20.0):
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        threading.Event().wait(0.01)


def _count_threads() -> int:
    """All but the one that watches tqdm's bars, which transformers starts once in a process."""
    return sum(type(thread).__name__ != "TMonitor" for thread in threading.enumerate())
