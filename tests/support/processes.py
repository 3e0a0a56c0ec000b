"""Processes of one federation, each of which can be killed and started again; they say what they came to as JSON."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import children
from paths import ROOT

_CODE = """
import json, logging, msgspec, sys
logging.basicConfig(level=logging.INFO)
from fleetune.device_runtime.agent import presence
presence.HELLO_S = {hello_s}  # else a lost one costs 30 s
from {module} import {function}
report = {function}({artifact!r}, **json.loads(sys.argv[1]))
sys.stdout.write(msgspec.json.encode(report).decode())
"""


def environment() -> dict[str, str]:
    """That of a process which imports this repository, and what lies beside this file."""
    return {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "OMP_NUM_THREADS": "1",
    }


class Processes:
    """By name; what each says goes to ``NAME.log`` in a folder. ``prefix`` begins all commands."""

    def __init__(
        self, root: Path, artifact: Path, *, hello_s: float = 1.0, prefix: Sequence[str] = ()
    ) -> None:
        self.root, self.artifact, self._hello_s, self._prefix = root, artifact, hello_s, list(prefix)
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, function: str, options: dict[str, Any], *, module: str = "flat") -> None:
        """Start a function of :mod:`flat`, ``aggregate`` or ``device``, or of another ``module``."""
        places = {"artifact": str(self.artifact), "hello_s": self._hello_s}
        code = _CODE.format(function=function, module=module, **places)
        command = [*self._prefix, sys.executable, "-c", code, json.dumps(options)]
        with (self.root / f"{name}.log").open("ab") as log:
            self.running[name] = children.start(
                command, stdout=subprocess.PIPE, stderr=log, env=environment()
            )

    def is_over(self, name: str) -> bool:
        """Whether one has ended by itself, or was killed."""
        return self.running[name].poll() is not None

    def kill(self, name: str) -> None:
        """Kill one, by SIGKILL."""
        self.running[name].kill()
        self.running[name].wait()
        self.running[name].stdout.close()

    def pause(self, name: str) -> None:
        """Stop one, by SIGSTOP: its connections stay."""
        self.running[name].send_signal(signal.SIGSTOP)

    def report(self, name: str, *, timeout_s: float) -> dict[str, Any]:
        """What one came to; it has to end well."""
        output, _ = self.running[name].communicate(timeout=timeout_s)
        assert self.running[name].returncode == 0, self.log(name)
        return json.loads(output)

    def log(self, name: str) -> str:
        """The end of what one has said."""
        return (self.root / f"{name}.log").read_text()[-3000:]

    def close(self) -> None:
        """Kill all."""
        for name in self.running:
            self.kill(name)
