"""Runs command lines of fleetune in forks of one process: a try costs milliseconds, and each starts as fresh as the first.

As a program it reads tries as JSON lines from standard input and answers each with a line.
"""

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import children
from paths import ROOT

PR_SET_PDEATHSIG = 1


class Ended(NamedTuple):
    """What became of a command line."""

    code: int
    """-9 where it had to be killed: it hung."""
    out: str
    err: str


class Forks:
    """A process to fork from; a context manager. ``modules`` are imported once, before any fork."""

    def __init__(self, *modules: str) -> None:
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")])
        calm = {
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "HF_HUB_OFFLINE": "1",
            "COLUMNS": "200",
        }
        self._process = children.start(
            [sys.executable, __file__, *modules],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **calm, "PYTHONPATH": path},
        )

    def __enter__(self) -> "Forks":
        return self

    def __exit__(self, *_) -> None:
        self._process.stdin.close()
        self._process.wait(10)

    def run(self, *words: object, cwd: Path, stop_after_s: float = 60) -> Ended:
        """Run ``fleetune WORDS``; after so many seconds it gets a SIGTERM, and ten later a SIGKILL."""
        print(
            json.dumps([list(map(str, words)), str(cwd), stop_after_s]), file=self._process.stdin, flush=True
        )
        return Ended(*json.loads(self._process.stdout.readline()))


def _serve(modules: list[str]) -> None:
    for name in modules:
        __import__(name)
    for line in sys.stdin:
        words, cwd, stop_after_s = json.loads(line)
        print(json.dumps(_try(words, cwd, stop_after_s)), flush=True)


def _try(words: list[str], cwd: str, stop_after_s: float) -> tuple[int, str, str]:
    with tempfile.TemporaryFile("w+b") as out, tempfile.TemporaryFile("w+b") as err:
        child = os.fork()
        if not child:
            _become(words, cwd, out.fileno(), err.fileno())
        code = _reap(child, stop_after_s)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)  # whatever it has left behind
        out.seek(0), err.seek(0)
        return code, out.read().decode(errors="replace"), err.read().decode(errors="replace")


def _become(words: list[str], cwd: str, out: int, err: int) -> None:
    code = 1
    try:
        os.setpgid(0, 0)
        _die_with_parent()
        os.chdir(cwd)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        code = _run(words)
    finally:
        os._exit(code)


def _die_with_parent() -> None:
    """A fork does not inherit it: without, tries of a test that is killed go on, and what they start with them."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _run(words: list[str]) -> int:
    from fleetune.toolkit.cli import main

    sys.argv = ["fleetune", *words]
    try:
        main()
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else int(exc.code is not None)
    except BaseException:  # noqa: BLE001 - whatever it is, it is what a user would see
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


def _reap(child: int, stop_after_s: float) -> int:
    for patience, last in ((stop_after_s, signal.SIGTERM), (10.0, signal.SIGKILL), (10.0, 0)):
        end = time.monotonic() + patience
        while time.monotonic() < end:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.005)
        os.kill(child, last)
    raise AssertionError("not even SIGKILL ends it")


if __name__ == "__main__":
    _serve(sys.argv[1:])
