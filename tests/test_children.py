"""Nothing that a test has started outlives a test process that is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import children
import pytest
from paths import ROOT
from waiting import until

STARTS = """
import sys, time
import children
from servers import Mosquitto

def test_waits(tmp_path):
    server = Mosquitto(tmp_path).start()
    other = children.start([sys.executable, "-c", "import time; time.sleep(600)"])
    print("\\nchildren", server._process.pid, other.pid, flush=True)
    time.sleep(600)
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(children.SETPRIV is None, reason="setpriv (util-linux) is not installed")
def test_children_die_with_a_killed_pytest(tmp_path):
    (tmp_path / "test_starts.py").write_text(STARTS)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])}
    command = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", tmp_path / "test_starts.py"]
    with children.start(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=tmp_path) as process:
        said = next(line for line in process.stdout if line.startswith("children"))
        pids = [int(word) for word in said.split()[1:]]
        assert all(map(is_alive, pids))
        process.send_signal(signal.SIGKILL)
    until(lambda: not any(map(is_alive, pids)), saying=lambda: "they live on")
