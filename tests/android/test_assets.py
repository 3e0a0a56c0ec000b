"""The part of the app that knows nothing of Android, on a JVM."""

import shutil
import subprocess
from pathlib import Path

import pytest

APP = Path(__file__).resolve().parents[2] / "android_demo"

pytestmark = pytest.mark.skipif(
    not shutil.which("javac"), reason="no JDK: apt-get install default-jdk-headless"
)


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Assets and what asks it, compiled for Java 8."""
    folder = tmp_path_factory.mktemp("classes")
    sources = [APP / "src/org/fleetune/demo/Assets.java", Path(__file__).with_name("Ask.java")]
    subprocess.run(["javac", "--release", "8", "-Xlint:-options", "-d", folder, *sources], check=True)
    return folder


def test_addresses_name_the_apps_own_files_and_no_others(classes: Path) -> None:
    expected = {
        "/": "www/index.html\ttext/html utf-8",
        "/engine/chain.mjs": "www/engine/chain.mjs\ttext/javascript utf-8",
        "/artifact/manifest.json": "www/artifact/manifest.json\tapplication/json utf-8",
        "/artifact/graphs/head.onnx": "www/artifact/graphs/head.onnx\tapplication/octet-stream null",
        "/ort.WASM": "www/ort.WASM\tapplication/wasm null",
        "/LICENSE": "www/LICENSE\tapplication/octet-stream null",
        "/../AndroidManifest.xml": "null\t",
        "/a/../../b": "null\t",
        "/a//b": "null\t",
        "/a/": "null\t",
        "/./a": "null\t",
        "/a\\..\\b": "null\t",
        "relative": "null\t",
    }
    told = subprocess.run(
        ["java", "-cp", classes, "org.fleetune.demo.Ask"],
        input="\n".join(expected),
        capture_output=True,
        text=True,
        check=True,
    )
    assert dict(zip(expected, told.stdout.splitlines(), strict=True)) == expected
