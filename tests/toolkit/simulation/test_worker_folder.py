import subprocess
import sys

from fleetune.toolkit.simulation.worker_folder import WorkerFolder


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_has_is_not(tmp_path, monkeypatch):
    code = "from fleetune.toolkit.simulation.worker_folder import WorkerFolder as W; import os; W(); os.kill(os.getpid(), 9)"
    subprocess.run(
        [sys.executable, "-c", code],
        env={"TMPDIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "fleetune-worker-of-an-earlier-release").mkdir()
    one = WorkerFolder()
    assert not left.exists()
    two = WorkerFolder()
    assert one.path.exists()
    assert two.path.exists()
    two.close()
    one.close()
    assert [path.name for path in tmp_path.iterdir()] == ["fleetune-worker-of-an-earlier-release"]
