"""A page as a real browser has it: Chromium without a window, if one is installed."""

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--enable-logging=stderr",
    ),
)

needs_browser = pytest.mark.skipif(
    not CHROMIUM, reason="chromium is not installed (apt-get install chromium)"
)


def dump(url: str, *, budget_ms: int = 3000) -> tuple[str, str]:
    """Return the document as it stands after so much virtual time, and what the browser logged of it."""
    done = _run(f"--virtual-time-budget={budget_ms}", "--dump-dom", url)
    log = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return done.stdout, log


def screenshot(url: str, file: Path, *, size: str = "1280,760", budget_ms: int = 3000) -> Path:
    """Draw the page into a PNG file."""
    _run(
        f"--virtual-time-budget={budget_ms}",
        f"--screenshot={file}",
        f"--window-size={size}",
        url,
    )
    return file


def states(document: str) -> dict[str, str]:
    """State by device, read from the page's table."""
    rows = re.findall(r'<tr><td>([^<]*)</td><td class="state [a-z]*">([^<]*)</td>', document)
    return dict(rows)


def _run(*words: str) -> "subprocess.CompletedProcess[str]":
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [CHROMIUM, *_QUIET, f"--user-data-dir={profile}", *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
