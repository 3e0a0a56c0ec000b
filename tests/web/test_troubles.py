"""What goes wrong on a page, in a real browser: each a sentence that says what to do, and never a blank page."""

import json
import shutil
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, needs_browser
from node_web import needs_page, needs_web, run
from servers import Mosquitto, free_port
from signed import KEY
from web_federation import websocket_server

from fleetune.toolkit.web import serving

pytestmark = [
    needs_web,
    pytest.mark.slow,
    needs_browser,
    needs_page(),
]
PLAIN = "MAP plain.test 127.0.0.1"
NO_STORAGE = {"profile": {"default_content_setting_values": {"cookies": 2}}}


def troubles(folder: Path, cases):
    """What the page says in each case."""
    folder.mkdir(exist_ok=True)
    path = folder / "troubles.json"
    given = {"profile": folder / "profiles", "chromium": CHROMIUM, "cases": cases}
    path.write_text(json.dumps(given, default=str))
    return run("troubles.mjs", path)


def check(found, said):
    assert set(found) == set(said)
    for name, row in found.items():
        assert "failed" not in row, (name, row)
        assert row["isShown"], (name, row)
        assert row["heading"], (name, row)
        assert said[name] in row["trouble"], (name, row)
        assert row["trouble"].endswith((".", "!", "?")), (name, row)
        assert "unexpected" not in row["trouble"], (name, row)
        assert "Loading" not in row["model"], (name, row)


def test_artifacts_and_servers_that_are_damaged_or_gone(word_artifact, tmp_path):
    def truncated(folder):
        path = folder / "base.safetensors"
        path.write_bytes(path.read_bytes()[:-4])

    def changed(folder):
        path = folder / "graphs/head.train.onnx"
        path.write_bytes(path.read_bytes()[:-1] + b"x")

    def another(folder):
        (folder / "manifest.json").write_text("<!doctype html><p>Sign in to this network</p>")

    def without(folder):
        (folder / "manifest.json").unlink()

    spoils = {
        "truncated": (truncated, "base.safetensors: 86656 bytes"),
        "changed": (changed, "graphs/head.train.onnx: SHA-256 differs"),
        "no manifest": (another, "not a manifest"),
        "no artifact": (without, "the server answers 404"),
    }
    found = {}
    for name, (spoil, _) in spoils.items():
        folder = Path(shutil.copytree(word_artifact, tmp_path / name.replace(" ", "-")))
        with serving(folder) as (url, _):
            spoil(folder)
            found |= troubles(tmp_path / f"{name} page", [{"name": name, "url": url, "does": "open"}])
    said = {name: said.split(": 86656")[0] for name, (_, said) in spoils.items()}
    with serving(word_artifact) as (url, _):
        gone = {
            "settings": (["settings.json"], "open", "is fleetune web still running"),
            "tensors": (["artifact/base.safetensors"], "open", "is fleetune web still running"),
            "worker": (["worker.js"], "open", "load the page again"),
            "runtime": (["ort-wasm-simd-threaded.wasm"], "train", "load the page again"),
        }
        cases = [{"name": n, "url": url, "does": does, "blocks": b} for n, (b, does, _) in gone.items()]
        found |= troubles(tmp_path / "gone", cases)
    check(found, said | {name: text for name, (*_, text) in gone.items()})


def test_data_that_cannot_be_read_and_storage_that_is_full_or_forbidden(word_artifact, tmp_path):
    picture = tmp_path / "photo.png"
    picture.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    table = tmp_path / "table.csv"
    table.write_text("a,b\n1,2\n")
    with serving(word_artifact) as (url, _):
        cases = [
            {"name": "picture", "does": "file", "file": picture},
            {"name": "columns", "does": "file", "file": table},
            {"name": "labels", "does": "text", "text": "text,label\ncat,zebra\n"},
            {"name": "full", "does": "long", "quota": 100000},
            {"name": "forbidden", "does": "open", "prefs": NO_STORAGE},
        ]
        found = troubles(tmp_path / "page", [case | {"url": url} for case in cases])
    said = {
        "picture": "photo.png is not text in UTF-8; save it as JSON lines, CSV or TSV",
        "columns": "text",
        "labels": "zebra",
        "full": "Storage is full: delete what this page keeps",
        "forbidden": "what you train is gone when this tab closes",
    }
    check(found, said)


def test_jobs_that_cannot_be_joined(word_artifact, tmp_path):
    """A second tab, a login, a server without WebSockets and none at all, and keys that cannot be looked at."""
    pem = _pem()
    folder = tmp_path / "servers"
    folder.mkdir()
    server, ws = websocket_server(folder)
    locked = tmp_path / "locked"
    locked.mkdir()
    port = free_port()
    lines = ("allow_anonymous false", f"listener {port} 127.0.0.1", "protocol websockets")
    given = {"job": "words", "name": "b"}
    found, closed = {}, free_port()
    with server, Mosquitto(locked, *lines):
        for name, mqtt, more in [
            ("two tabs", ws, {"does": "twice", "join": given}),
            (
                "login",
                f"ws://127.0.0.1:{port}",
                {"join": given | {"username": "kitchen", "password": "wrong"}},
            ),
            ("no websockets", server.url.replace("mqtt://", "ws://"), {"join": given}),
            ("no server", f"ws://127.0.0.1:{closed}", {"join": given}),
            (
                "no key",
                ws,
                {"join": given | {"trust": "-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----"}},
            ),
            ("not signed", ws, {"join": given | {"trust": pem}}),
            ("plain http", ws, {"join": given | {"trust": pem}, "hostRules": PLAIN}),
        ]:
            with serving(word_artifact, mqtt=mqtt, job="words") as (url, _):
                url = f"http://plain.test:{urlsplit(url).port}/" if "hostRules" in more else url
                case = {"name": name, "url": url, "does": "join", **more}
                found |= troubles(tmp_path / name.replace(" ", "-"), [case])
    said = {
        "two tabs": "Another tab of this page is in this job under this name; close it, or give this device another name",
        "login": "look at the user and the password",
        "no websockets": 'with a listener of "protocol websockets"',
        "no server": "is the server there",
        "no key": "this is a private key; expected public keys alone",
        "not signed": "nobody did: run fleetune sign",
        "plain http": "open the page over https or on localhost",
    }
    check(found, said)
    assert "the page is not isolated" in found["plain http"]["facts"]


def _pem():
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return KEY.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
