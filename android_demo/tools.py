"""Find the tools that build the app: an Android SDK, or Debian's packages, which `make apk` installs.

Debian 12 has all but a compiler to dex and an android.jar; both are taken from Debian 11, by digest.
"""

import hashlib
import os
import shutil
import subprocess
import urllib.request
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
PACKAGES = ("aapt", "zipalign", "apksigner", "android-framework-res")
"""Debian's, by name."""
_LARGEST = 100_000_000
"""Bytes of what is fetched."""
FRAMEWORK = Path("/usr/share/android-framework-res/framework-res.apk")


class Fetched(NamedTuple):
    """A package of another Debian."""

    path: str
    sha256: str
    jar: str
    """The file in it that is used."""


DX = Fetched(
    "pool/main/a/android-platform-dalvik/dalvik-exchange_10.0.0+r36-1_all.deb",
    "8fc128db7c27253d963eb9b33de79b197162a4749d2ba69019b2fd0664cbd7fe",
    "usr/share/java/com.android.dx-10.0.0.jar",
)
ANDROID = Fetched(
    "pool/main/a/android-framework-23/libandroid-23-java_6.0.1+r72-6_all.deb",
    "8af1b6df556971dda0a6da3536ea526a838e0c363afcdd454213d8bce94793e3",
    "usr/share/java/com.android.android-23.jar",
)


class Tools(NamedTuple):
    """Commands, as they are begun, and what is compiled against."""

    aapt2: str
    zipalign: str
    apksigner: str
    dex: tuple[str, ...]
    """Takes --output FOLDER and class files."""
    android: Path
    """android.jar"""
    resources: Path
    """Where aapt2 finds the platform's own resources."""


def find() -> Tools:
    """The SDK that ANDROID_HOME names, else Debian's packages; what those lack is fetched into ``build/``.

    Raises:
        SystemExit: a tool is missing; the line says which and what brings it.
    """
    if home := os.environ.get("ANDROID_HOME"):
        return _of_sdk(Path(home))
    names = {
        "aapt2": "aapt",
        "zipalign": "zipalign",
        "apksigner": "apksigner",
        "java": "default-jdk-headless",
    }
    if missing := [package for tool, package in names.items() if not shutil.which(tool)]:
        raise SystemExit(
            f"missing: {', '.join(missing)}; apt-get install them, or set ANDROID_HOME to an Android SDK"
        )
    if not FRAMEWORK.exists():
        raise SystemExit(f"missing: {FRAMEWORK}; apt-get install android-framework-res")
    dx = ("java", "-cp", str(_fetched(DX)), "com.android.dx.command.Main", "--dex", "--min-sdk-version=26")
    return Tools("aapt2", "zipalign", "apksigner", dx, _fetched(ANDROID), FRAMEWORK)


def _of_sdk(home: Path) -> Tools:
    """The newest build tools and platform of an Android SDK."""
    tools = max((home / "build-tools").glob("*/"), key=_version, default=None)
    platform = max((home / "platforms").glob("android-*/"), key=_version, default=None)
    if tools is None or platform is None:
        raise SystemExit(f"{home}: no build-tools or no platforms; sdkmanager installs them")
    jar = platform / "android.jar"
    d8 = (str(tools / "d8"), "--min-api", "26", "--lib", str(jar))
    return Tools(str(tools / "aapt2"), str(tools / "zipalign"), str(tools / "apksigner"), d8, jar, jar)


def _version(folder: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in folder.name.removeprefix("android-").split(".") if part.isdigit())


def _fetched(package: Fetched) -> Path:
    """The jar of a package, fetched once."""
    unpacked = BUILD / "tools" / package.sha256[:16]
    jar = unpacked / package.jar
    if jar.exists():
        return jar
    name = package.path.rpartition("/")[2]
    print(f"fetching {name}", flush=True)
    content = _download(package)
    if (found := hashlib.sha256(content).hexdigest()) != package.sha256:
        raise SystemExit(f"{name}: its SHA-256 is {found}, expected {package.sha256}: not used")
    unpacked.mkdir(parents=True, exist_ok=True)
    deb = unpacked / name
    deb.write_bytes(content)
    subprocess.run(["dpkg", "-x", deb, unpacked], check=True)
    deb.unlink()
    return jar


def _download(package: Fetched) -> bytes:
    """From the mirrors that this machine's apt knows: they hold the packages of older Debians too, for some years."""
    told: object = "apt knows no mirror of Debian"
    for mirror in _mirrors():
        try:
            with urllib.request.urlopen(f"{mirror}{package.path}", timeout=60) as answer:
                content: bytes = answer.read(_LARGEST)
                return content
        except OSError as exc:
            told = exc
    raise SystemExit(f"{package.path}: {told}; or set ANDROID_HOME to an Android SDK")


def _mirrors() -> list[str]:
    listed = ("apt-get", "indextargets", "--format", "$(ORIGIN) $(REPO_URI)", "Created-By: Packages")
    lines = subprocess.run(listed, capture_output=True, text=True, check=True).stdout.splitlines()
    return sorted({line.removeprefix("Debian ") for line in lines if line.startswith("Debian ")})
