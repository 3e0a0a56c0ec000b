"""Processes started by tests: they die with the test process, even if that is killed."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

SETPRIV = shutil.which("setpriv")
# A parent that died before the child asked to die with it would leave the child for ever.
ORPHAN_ENDS = '[ "$PPID" = "$0" ] && exec "$@"'
# Linux ends a child when the thread that started it ends: this one lives as long as the process.
_starter = ThreadPoolExecutor(1, "starts children")


def start(command, **options) -> subprocess.Popen:
    """As ``subprocess.Popen``."""
    mortal = [SETPRIV, "--pdeathsig", "KILL", "--", "sh", "-c", ORPHAN_ENDS, os.getpid()] if SETPRIV else []
    return _starter.submit(subprocess.Popen, list(map(str, [*mortal, *command])), **options).result()
