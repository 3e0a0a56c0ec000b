"""Opens an artifact where its backend runs: here, or in a process of the environment of ONNX Runtime Training.

Run as a script it is that process: pickled calls come in, pickled results go out.
"""

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

from paths import ROOT

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.engine.backends import open_engine

ORT_PYTHON = ROOT / ".venv-ort" / "bin" / "python"


def open_anywhere(artifact: Artifact, *, threads: int = 0, **setup: Any) -> Any:
    """As ``open_engine``."""
    if artifact.manifest.backend == "ort-training":
        return FarEngine(artifact, threads)
    return open_engine(artifact, threads=threads, **setup)


def selfcheck_anywhere(folder: Path) -> float:
    """The largest relative error of ``fleetune selfcheck``."""
    if open_artifact(folder, verify=False).manifest.backend != "ort-training":
        return selfcheck(folder).max_relative_error
    command = [str(ORT_PYTHON.with_name("fleetune")), "selfcheck", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return float(json.loads(done.stdout.splitlines()[-1])["max_relative_error"])


class FarEngine:
    """An engine's methods, each a call to the process."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        import children

        command = [ORT_PYTHON, __file__, artifact.folder, threads]
        self._process = children.start(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def __enter__(self) -> "FarEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate()

    def __getattr__(self, method: str) -> Any:
        return lambda *given, **named: self._call(method, given, named)

    def _call(self, method: str, given: Any, named: Any) -> Any:
        pickle.dump((method, given, named), self._process.stdin)
        self._process.stdin.flush()
        return pickle.load(self._process.stdout)


def serve(folder: Path, threads: int) -> None:
    """Answer calls until there are no more."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    with open_engine(open_artifact(folder, verify=False), threads=threads) as engine:
        while sys.stdin.buffer.peek(1):
            method, given, named = pickle.load(sys.stdin.buffer)
            pickle.dump(getattr(engine, method)(*given, **named), out)
            out.flush()


if __name__ == "__main__":
    serve(Path(sys.argv[1]), int(sys.argv[2]))
