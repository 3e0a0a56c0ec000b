"""Build, align and sign the app: the page of web_demo/ and an artifact in an Android package.

    python android_demo/build.py [ARTIFACT]

FLEETUNE_MQTT is the address that the page joins jobs at, ws:// or wss://; without it, it trains alone. FLEETUNE_JOB names a job.
The key is the user's own where FLEETUNE_KEYSTORE, FLEETUNE_KEYSTORE_PASS and FLEETUNE_KEY_ALIAS name one; else a throw-away key
is made once in ``build/``.
"""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from tools import BUILD, HERE, Tools, find

APK = BUILD / "fleetune-demo.apk"
PAGE = HERE.parent / "toolkit" / "page"
SMALL = HERE.parent / "tests" / "data" / "tiny_artifact"
MANIFEST = "manifest.json"
_THROW_AWAY = "throw-away"


def main(arguments: list[str]) -> int:
    """Build ``build/fleetune-demo.apk``; see the module."""
    tools = find()
    classes, assets = _fresh("classes"), _fresh("assets")
    _fill(assets / "www", Path(arguments[0]) if arguments else SMALL)
    linked = _linked(tools, assets)
    _compile(tools, classes)
    _dex(tools, classes)
    with zipfile.ZipFile(linked, "a", zipfile.ZIP_DEFLATED) as package:
        package.write(BUILD / "classes.dex", "classes.dex")
    _run(tools.zipalign, "-f", "-p", "4", linked, BUILD / "aligned.apk")
    _sign(tools)
    print(f"{APK.relative_to(HERE.parent)}: {APK.stat().st_size / 1e6:.1f} MB", flush=True)
    return 0


def _fresh(name: str) -> Path:
    folder = BUILD / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _linked(tools: Tools, assets: Path) -> Path:
    """Manifest, resources and assets in one package, and R.java."""
    compiled, linked = BUILD / "resources.zip", BUILD / "linked.apk"
    _run(tools.aapt2, "compile", "--dir", HERE / "res", "-o", compiled)
    _run(
        *(tools.aapt2, "link", "-I", tools.resources, "--manifest", HERE / "AndroidManifest.xml"),
        *("-A", assets, "--java", _fresh("made"), "-o", linked, compiled),
    )
    return linked


def _compile(tools: Tools, classes: Path) -> None:
    """Java 8, against the platform's own classes: --release would check nothing of Android."""
    sources = [*(HERE / "src").rglob("*.java"), *(BUILD / "made").rglob("*.java")]
    flags = ["-source", "8", "-target", "8", "-Xlint:all,-options", "-Werror", "-encoding", "utf-8"]
    _run("javac", *flags, "-bootclasspath", tools.android, "-d", classes, *sources)


def _dex(tools: Tools, classes: Path) -> None:
    output = BUILD / "classes.dex"
    output.unlink(missing_ok=True)
    named = [f"--output={output}"] if tools.dex[0] == "java" else ["--output", str(BUILD)]
    _run(
        *tools.dex,
        *named,
        *(path.relative_to(classes) for path in sorted(classes.rglob("*.class"))),
        where=classes,
    )


def _sign(tools: Tools) -> None:
    given = os.environ.get("FLEETUNE_KEYSTORE")
    store = Path(given) if given else _throw_away_key()
    environment = os.environ if given else {**os.environ, "FLEETUNE_KEYSTORE_PASS": _THROW_AWAY}
    alias = os.environ.get("FLEETUNE_KEY_ALIAS", _THROW_AWAY)
    secret = ("--ks-pass", "env:FLEETUNE_KEYSTORE_PASS")
    _run(
        *(tools.apksigner, "sign", "--ks", store, "--ks-key-alias", alias, *secret),
        *("--out", APK, BUILD / "aligned.apk"),
        environment=environment,
    )
    _run(tools.apksigner, "verify", APK)


def _throw_away_key() -> Path:
    store = BUILD / "throw-away.p12"
    if not store.exists():
        print(
            "making a throw-away key: an app signed by it can't be updated by one signed with another",
            flush=True,
        )
        _run(
            *(
                "keytool",
                "-genkeypair",
                "-keystore",
                store,
                "-storetype",
                "PKCS12",
                "-storepass",
                _THROW_AWAY,
            ),
            *(
                "-alias",
                _THROW_AWAY,
                "-keyalg",
                "RSA",
                "-keysize",
                "3072",
                "-validity",
                "10000",
                "-dname",
                "CN=fleetune demo",
            ),
        )
    return store


def _run(
    *command: object,
    where: Path | None = None,
    environment: "os._Environ[str] | dict[str, str] | None" = None,
) -> None:
    done = subprocess.run(
        [*map(str, command)], cwd=where, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{Path(str(command[0])).name}: {(done.stderr or done.stdout).strip()}")


def _fill(www: Path, artifact: Path) -> None:
    """The page's files, the artifact's listed ones where the page looks for them, and what `fleetune web` would tell the page."""
    if not (PAGE / "index.html").is_file():
        raise SystemExit(f"no page is built in {PAGE}: run `make web`, which takes node")
    try:
        names = json.loads((artifact / MANIFEST).read_bytes())["files"]
    except (OSError, ValueError, KeyError) as exc:
        raise SystemExit(f"{artifact}: no artifact: {exc}") from exc
    shutil.copytree(PAGE, www, ignore=shutil.ignore_patterns("ort.webgpu.*", "*.asyncify.*"))  # 27 MB
    for name in (MANIFEST, *names):
        target = www / "artifact" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(artifact / name, target)
    told = {"mqtt": os.environ.get("FLEETUNE_MQTT", ""), "job": os.environ.get("FLEETUNE_JOB", "")}
    (www / "settings.json").write_text(json.dumps(told), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
