"""``fleetune web`` and its page: what is served and what is not, and one walk through it in Chromium."""

import http.client
import json
import shutil
import socket
import struct
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from browser import CHROMIUM, needs_browser
from enrolled import authority_of
from node_web import WEB, needs_page, needs_web, run
from processes import Processes
from safetensors.numpy import load_file
from web_federation import JOB, federation, furthest, own_options, websocket_server
from words import write_lines

from fleetune.broker.authority.authority import init
from fleetune.device_runtime.commands.sign import sign
from fleetune.device_runtime.errors import ArtifactError, ConfigError
from fleetune.device_runtime.network.signing import write_key_pair
from fleetune.toolkit.web import serving


@pytest.fixture
def page(tmp_path):
    """A page without a runtime: what the server does with its files is all that matters."""
    folder = tmp_path / "page"
    folder.mkdir()
    for name in ("index.html", "style.css", "icon.svg"):
        shutil.copy(WEB / "page" / name, folder)
    (folder / "worker.js").write_text("postMessage(1);\n" * 100)
    return folder


def ask(url, path, headers=None, method="GET"):
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=10)
    connection.request(method, path, headers=headers or {})
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.getheaders()), content


def test_the_artifact_and_the_page_are_served_isolated_and_nothing_else(word_artifact, page):
    (word_artifact / "secret.txt").write_text("not listed")
    with serving(word_artifact, mqtt="ws://pi.local:9001", job="home", page=page) as (url, requests):
        status, headers, content = ask(url, "/")
        assert status == 200
        assert content == (page / "index.html").read_bytes()
        assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
        assert headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        policy = headers["Content-Security-Policy"]
        assert "default-src 'none'" in policy
        assert "connect-src 'self' ws://pi.local:9001;" in policy
        assert "unsafe-inline" not in policy
        assert "'unsafe-eval'" not in policy
        settings = {"mqtt": "ws://pi.local:9001", "job": "home", "trust": "", "mask_authority": ""}
        assert json.loads(ask(url, "/settings.json")[2]) == settings
        assert ask(url, "/artifact/manifest.sig")[0] == 404
        for name in ("manifest.json", "base.safetensors", "graphs/head.train.onnx", "golden.safetensors"):
            assert ask(url, f"/artifact/{name}")[2] == (word_artifact / name).read_bytes()
        strange = [
            "/artifact/secret.txt",
            "/artifact/../secret.txt",
            "/../pyproject.toml",
            "/artifact/%2e%2e/x",
            "/nothing",
            "//etc/passwd",
        ]
        assert {ask(url, path)[0] for path in strange} == {404}
        packed = ask(url, "/worker.js", {"Accept-Encoding": "gzip"})
        assert packed[1]["Content-Encoding"] == "gzip"
        assert len(packed[2]) < 200
        status, headers, content = ask(url, "/worker.js", method="HEAD")
        assert (status, content) == (200, b"")
        assert headers["Content-Length"] == "1600"
        assert requests() > 10
    (word_artifact / "secret.txt").unlink()


@pytest.mark.parametrize(
    ("mqtt", "said"),
    [
        ("mqtt://server", "over WebSockets alone"),
        ("ws://", "over WebSockets alone"),
        ("ws://a; script-src *", "over WebSockets alone"),
        ("ws://me:secret@server", "leave the login out"),
        ("ws://server:99999", "ort"),
    ],
)
def test_an_address_that_no_page_can_speak_to_is_refused(mqtt, said, word_artifact, page):
    with pytest.raises(ConfigError, match=said) as caught, serving(word_artifact, mqtt=mqtt, page=page):
        pass
    assert "secret" not in str(caught.value)


def test_what_cannot_be_served_is_one_sentence(word_artifact, page, tmp_path):
    with pytest.raises(ConfigError, match="make web"), serving(word_artifact, page=tmp_path):
        pass
    with pytest.raises(ArtifactError), serving(tmp_path, page=page):
        pass
    with serving(word_artifact, page=page) as (url, _):
        port = urlsplit(url).port
        with pytest.raises(ConfigError, match="another --port"), serving(word_artifact, page=page, port=port):
            pass


def test_a_pinned_key_and_the_signature_are_served_and_nothing_private_is(word_artifact, page, tmp_path):
    write_key_pair(tmp_path / "key", tmp_path / "key.pub")
    folder = Path(shutil.copytree(word_artifact, tmp_path / "artifact"))
    with (
        pytest.raises(ArtifactError, match="nobody did"),
        serving(folder, page=page, trust=tmp_path / "key.pub"),
    ):
        pass
    sign(folder, sign_key=tmp_path / "key")
    with pytest.raises(ConfigError, match="private key"), serving(folder, page=page, trust=tmp_path / "key"):
        pass
    with serving(folder, page=page, trust=tmp_path / "key.pub") as (url, _):
        assert json.loads(ask(url, "/settings.json")[2])["trust"] == (tmp_path / "key.pub").read_text()
        assert ask(url, "/artifact/manifest.sig")[2] == (folder / "manifest.sig").read_bytes()


def test_the_masks_authority_is_served_and_no_key_beside_it(word_artifact, page, tmp_path):
    init(tmp_path / "trust", hosts=["server"])
    told, key = tmp_path / "trust" / "ca.crt", (tmp_path / "trust" / "ca.key").read_bytes()
    (tmp_path / "both.pem").write_bytes(key + told.read_bytes())
    for given, served in ((told, told.read_text()), (tmp_path / "both.pem", told.read_text()), ("none", "")):
        with serving(word_artifact, page=page, mask_authority=given) as (url, _):
            assert json.loads(ask(url, "/settings.json")[2])["mask_authority"] == served
    with (
        pytest.raises(ConfigError, match="no certificate of an authority in PEM"),
        serving(word_artifact, page=page, mask_authority=tmp_path / "trust" / "ca.key"),
    ):
        pass


def test_a_tab_that_is_closed_while_it_loads_is_no_fault(word_artifact, page, capfd):
    """Its connection is reset, before it has asked and while it is answered."""
    (page / "worker.js").write_bytes(bytes(32 * 2**20))
    with serving(word_artifact, page=page) as (url, requests):
        parts = urlsplit(url)
        for number, said in enumerate((b"GET / HT", b"GET /worker.js HTTP/1.1\r\n\r\n")):
            with socket.create_connection((parts.hostname, parts.port)) as connection:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                connection.sendall(said)
                while requests() < number:
                    time.sleep(0.01)
        assert ask(url, "/")[0] == 200
    assert capfd.readouterr().err == ""


def test_the_lock_names_no_index():
    """Packages are pinned by version and digest, and come from whatever registry npm is set to."""
    lock = json.loads((WEB / "package-lock.json").read_text())
    packages = {name: row for name, row in lock["packages"].items() if name}
    assert all("integrity" in row for row in packages.values())
    assert not any("resolved" in row for row in packages.values())
    own = lock["packages"][""]
    pins = own["dependencies"] | own["devDependencies"]
    assert all(version[0].isdigit() for version in pins.values())


def walk(folder: Path, **options):
    path = folder / "walk.json"
    given = {"profile": folder / "profile", "chromium": CHROMIUM, **options}
    path.write_text(json.dumps(given, default=str))
    return run("walk.mjs", path)


@pytest.mark.slow
@needs_web
@needs_page()
@needs_browser
def test_one_walk_through_the_page(word_artifact, tmp_path):
    """Texts, training alone, prediction, a signed job beside a Python device with Chromium killed in its rounds, deletion."""
    folder = tmp_path / "page"
    folder.mkdir()
    long = {"local_steps": 40}
    server, ws = websocket_server(folder)
    data = {name: write_lines(tmp_path / f"{name}.csv", seed=seed) for seed, name in enumerate("ab")}
    common = {"mqtt": server.url, "job": "words", "timeout_s": 120}
    key, public = tmp_path / "key", tmp_path / "key.pub"
    write_key_pair(key, public)
    artifact = Path(shutil.copytree(word_artifact, tmp_path / "artifact"))
    sign(artifact, sign_key=key)
    processes = Processes(folder, artifact, hello_s=2.0)
    with server, serving(artifact, mqtt=ws, job="words", trust=public) as (url, _):
        job = {"out": str(folder / "run"), "sign_key": str(key), **JOB, **long}
        processes.start("aggregator", "aggregate", common | job)
        own = own_options(folder, "a", data["a"])
        processes.start("a", "device", common | own)
        try:
            seen = walk(
                tmp_path,
                url=url,
                lines=data["b"].read_text(),
                join={"job": "words", "name": "b"},
                killIn=["Round 1: step", "Round 2: step 3", "Round 3"],
                shots=tmp_path / "shots",
            )
            assert "failed" not in seen, seen
            processes.report("aggregator", timeout_s=60)
        finally:
            processes.close()
    assert seen["kills"] > 0
    assert seen["troubles"] == []
    assert seen["trouble"] == ""
    assert seen["selfcheck"]["ok"]
    assert seen["selfcheck"]["worst"] < 1e-5
    assert seen["isolated"]
    assert "not isolated" not in seen["facts"]
    assert seen["counted"] == "121 texts."
    assert seen["state"] == "Done: 12 steps."
    assert float(seen["loss-after"]) < float(seen["loss-before"])
    assert len(seen["answers"]) == 3
    assert seen["leftBefore"] == "Nothing: 0 bytes."
    assert seen["joined"].startswith("Finished")
    assert seen["trust"] == public.read_text()
    assert seen["leftJoined"].startswith("3 updates of")
    assert all("accepted" in line for line in seen["leftLines"])
    assert seen["unnamed"] == []
    assert not seen["overflow"]
    assert seen["leftAfter"] == "Nothing: 0 bytes."
    assert seen["linesAfter"] == ""
    typed = '"red green, blue","a"\n'
    expected, _ = federation(tmp_path / "python", word_artifact, long, node=None, more=typed)
    assert furthest(load_file(folder / "run" / "adapter" / "adapter_model.safetensors"), expected) < 1e-6


@pytest.mark.slow
@needs_web
@needs_page()
@needs_browser
def test_a_page_with_a_certificate_sums_beside_devices_that_demand_one(word_artifact, tmp_path):
    """The page demands others' too; killed in a round it joins again with the certificate and key that its browser kept."""
    folder = tmp_path / "page"
    folder.mkdir()
    authority, pairs = authority_of(tmp_path / "trust", "abc")
    server, ws = websocket_server(folder, authority.parent)
    data = {name: write_lines(tmp_path / f"{name}.csv", seed=seed) for seed, name in enumerate("abc")}
    common = {"mqtt": server.url, "job": "words", "timeout_s": 120, "ca_file": str(authority)}
    three = {"clients": 3, "min_clients": 3, "secure": "masks", "secure_range": 0.01, "secure_s": 300.0}
    processes = Processes(folder, word_artifact, hello_s=2.0)
    with server, serving(word_artifact, mqtt=ws, job="words", mask_authority=authority) as (url, _):
        job = {"out": str(folder / "run"), **JOB, **three, "grace_s": 120.0, "local_steps": 40}
        processes.start("aggregator", "aggregate", common | job)
        for name in "ac":
            own = own_options(folder, name, data[name])
            processes.start(name, "device", common | own | pairs[name]._asdict())
        try:
            join = {"job": "words", "name": "b", "certificate": pairs["b"].cert, "key": pairs["b"].key}
            killed = ["Round 1: step", "Round 2: step 3"]
            seen = walk(tmp_path, url=url, lines=data["b"].read_text(), join=join, killIn=killed, steps=2)
            assert "failed" not in seen, seen
            processes.report("aggregator", timeout_s=60)
        finally:
            processes.close()
    assert seen["kills"] > 0
    assert (seen["troubles"], seen["trouble"]) == ([], "")
    assert seen["joined"].startswith("Finished")
    assert seen["authority"] == authority.read_text()
    assert seen["leftJoined"].startswith("3 updates of")
    assert all("accepted" in line for line in seen["leftLines"])
    said = (folder / "aggregator.log").read_text()
    assert "round 3: masked are the updates of a, b, c" in said
    assert "declined" not in said


@pytest.mark.slow
@needs_web
@needs_page()
@needs_browser
def test_a_page_on_plain_http_from_another_host_still_trains(word_artifact, tmp_path):
    """No ``crypto.subtle``, no isolation, one thread: our own SHA-256, and the golden step right."""
    with serving(word_artifact) as (url, _):
        port = urlsplit(url).port
        found = walk(
            tmp_path, url=f"http://plain.test:{port}/", onlyOpen=True, hostRules="MAP plain.test 127.0.0.1"
        )
    assert found["selfcheck"] | {"worst": 0} == {
        "ok": True, "worst": 0, "limit": 1e-4, "count": 40, "threads": 1, "isolated": False, "subtle": False,
    }  # fmt: skip


@pytest.mark.slow
@needs_web
@needs_page()
@needs_browser
def test_a_spoilt_artifact_is_a_sentence_on_the_page(word_artifact, tmp_path):
    folder = Path(shutil.copytree(word_artifact, tmp_path / "artifact"))
    with serving(folder) as (url, _):
        content = bytearray((folder / "base.safetensors").read_bytes())
        content[-1] ^= 1
        (folder / "base.safetensors").write_bytes(content)
        found = walk(tmp_path, url=url, onlyOpen=True)
    assert "base.safetensors: SHA-256 differs" in found["trouble"]
    assert found["troubles"] == []
