"""The app as it is signed: what is in it, and that its page and artifact train in Chromium."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from browser import CHROMIUM, needs_browser
from node_web import needs_page, needs_web, run
from paths import ROOT

from fleetune.toolkit.web import serving

APP = ROOT / "android_demo"
TOOLS = ("aapt2", "aapt", "zipalign", "apksigner", "javac", "keytool")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not all(map(shutil.which, TOOLS)), reason="`make apk` installs what builds the app"),
    needs_page(),
]


@pytest.fixture(scope="module")
def apk() -> Path:
    """The app with the smallest artifact."""
    built = subprocess.run([sys.executable, APP / "build.py"], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return APP / "build" / "fleetune-demo.apk"


def told(*command: str | Path) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_the_app_is_signed_and_says_what_it_needs(apk: Path) -> None:
    verified = told("apksigner", "verify", "-v", apk)
    assert "v2 scheme (APK Signature Scheme v2): true" in verified
    assert "v3 scheme (APK Signature Scheme v3): true" in verified
    badging = told("aapt", "dump", "badging", apk)
    assert "package: name='org.fleetune.demo'" in badging
    assert "sdkVersion:'26'" in badging
    assert "launchable-activity: name='org.fleetune.demo.MainActivity'" in badging
    assert "locales: '--_--' 'de'" in badging
    asked = {line.partition("'")[2].rstrip("'") for line in badging.splitlines() if "uses-permission" in line}
    assert asked == {
        f"android.permission.{name}"
        for name in (
            *("INTERNET", "ACCESS_NETWORK_STATE", "FOREGROUND_SERVICE", "WAKE_LOCK"),
            "RECEIVE_BOOT_COMPLETED",
        )
    }
    told("zipalign", "-c", "4", apk)


def test_a_changed_app_is_refused(apk: Path, tmp_path: Path) -> None:
    content = bytearray(apk.read_bytes())
    content[len(content) // 3] ^= 1
    (tmp_path / "changed.apk").write_bytes(content)
    done = subprocess.run(["apksigner", "verify", tmp_path / "changed.apk"], capture_output=True, check=False)
    assert done.returncode != 0


@needs_web
@needs_browser
def test_what_is_taken_out_of_the_signed_app_trains(apk: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(apk) as package:
        package.extractall(tmp_path, [name for name in package.namelist() if name.startswith("assets/www/")])
    www = tmp_path / "assets" / "www"
    assert json.loads((www / "settings.json").read_text()) == {"mqtt": "", "job": ""}
    golden = run("selfcheck.mjs", www / "artifact")
    assert golden["ok"]
    assert golden["worst"] < 1e-5
    lines = "text,label\n" + "".join(
        f"red green {word},{'abc'[i % 3]}\n" for i, word in enumerate(["hen"] * 30)
    )
    given = {
        "profile": tmp_path / "profile",
        "chromium": CHROMIUM,
        "lines": lines,
        "app": True,
    }
    with serving(www / "artifact", page=www) as (url, _):
        (tmp_path / "walk.json").write_text(json.dumps(given | {"url": url}, default=str))
        seen = run("walk.mjs", tmp_path / "walk.json")
    assert "failed" not in seen, seen
    assert seen["troubles"] == []
    assert seen["selfcheck"]["ok"]
    assert seen["state"] == "Done: 12 steps."
    assert seen["told"] == [["training", True], ["training", False], ["whenCharging", False]]
