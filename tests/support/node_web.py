"""Runs the scripts of ``web_demo`` in Node, for tests; they are skipped where Node or its packages are not."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from fleetune.toolkit.web import PAGE

WEB = ROOT / "web_demo"
NODE = shutil.which("node")
_REASON = (
    "node is not installed" if not NODE else "web_demo/node_modules is not there: npm ci --prefix web_demo"
)

needs_web = pytest.mark.skipif(not NODE or not (WEB / "node_modules").is_dir(), reason=_REASON)


def needs_page(file: str = "index.html") -> pytest.MarkDecorator:
    """Skips where the built page lacks ``file``."""
    reason = "the page is not built: make web" if file == "index.html" else f"no {file}: make web WEBGPU=1"
    return pytest.mark.skipif(not (PAGE / file).is_file(), reason=reason)


def run(script: str, *arguments: str | Path, timeout: float = 600) -> Any:
    """The last line that ``web_demo/node/SCRIPT`` prints, decoded; its standard error is what a failure says."""
    done = subprocess.run(
        [str(NODE), str(WEB / "node" / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )
    assert done.stdout.strip(), done.stderr
    return json.loads(done.stdout.strip().splitlines()[-1])


def train(folder: Path, artifact: Path, runs: list[dict[str, Any]]) -> Any:
    """What ``train.mjs`` makes of each of ``runs``: data, work and more, as its head says."""
    given = folder / "options.json"
    given.write_text(json.dumps({"artifact": artifact, "runs": runs}, default=str))
    return run("train.mjs", given)
