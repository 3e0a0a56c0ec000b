"""Processes started by tests: they die with the test process, even if that is killed."""

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

SETPRIV = shutil.which("setpriv")
# Linux ends a child when the thread that started it ends: this one lives as long as the process.
_starter = ThreadPoolExecutor(1, "starts children")


def start(command, **options) -> subprocess.Popen:
    """As ``subprocess.Popen``."""
    mortal = [SETPRIV, "--pdeathsig", "KILL", "--"] if SETPRIV else []
    return _starter.submit(subprocess.Popen, [*mortal, *map(str, command)], **options).result()
