"""What ``make web`` puts into the page's folder, with and without WebGPU, and how large that is."""

import gzip
import json
import subprocess

import pytest
from node_web import NODE, WEB, needs_web

pytestmark = needs_web
OWN = {"app.js", "worker.js", "worker.js.LEGAL.txt", "index.html", "style.css", "icon.svg", "loaded.mjs"}
RUNTIME = {"ort-wasm-simd-threaded.wasm", "ort-wasm-simd-threaded.mjs"}
GPU = {
    "ort.webgpu.min.mjs",
    "ort-wasm-simd-threaded.asyncify.wasm",
    "ort-wasm-simd-threaded.asyncify.mjs",
}
ALONE = """
import assert from "node:assert";
import { pathToFileURL } from "node:url";
const [web, page] = process.argv.slice(1);
globalThis.WEBGPU_RUNTIME = false;
globalThis.self = { location: pathToFileURL(`${page}/worker.js`) };
const requestAdapter = async () => assert.fail("asked for an adapter");
Object.defineProperty(globalThis, "navigator", { value: { gpu: { requestAdapter } } });
const { fastest } = await import(pathToFileURL(`${web}/page/gpu.mjs`)), engine = { artifact: null };
const { engine: taken, said } = await fastest(engine);
console.log(JSON.stringify({ isSame: taken === engine, said }));
"""


def node(*arguments):
    done = subprocess.run([NODE, *arguments], capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The page as it is built by default."""
    folder = tmp_path_factory.mktemp("page") / "plain"
    node(WEB / "build.mjs", folder)
    return folder


def test_a_page_has_no_webgpu_unless_it_is_asked_for(plain, tmp_path):
    node(WEB / "build.mjs", "--webgpu", tmp_path / "page")
    sizes = [
        {path.name: path.stat().st_size for path in folder.iterdir()} for folder in (plain, tmp_path / "page")
    ]
    assert sizes[0].keys() == OWN | RUNTIME
    assert sizes[1].keys() == OWN | RUNTIME | GPU
    assert sizes[0].items() - {("worker.js", sizes[0]["worker.js"])} <= sizes[1].items()
    for folder, asks in ((plain, False), (tmp_path / "page", True)):
        assert ("ort.webgpu.min.mjs" in (folder / "worker.js").read_text()) == asks, folder
    assert sum(sizes[0].values()) < 16e6
    assert 26e6 < sum(sizes[1].values()) - sum(sizes[0].values()) < 28e6


def test_code_and_runtime_are_at_most_4_mb_compressed(plain):
    packed = {path.name: len(gzip.compress(path.read_bytes(), 6)) for path in plain.iterdir()}
    print(f"{sum(packed.values()) / 1e6:.2f} MB")
    assert sum(packed.values()) < 4e6, packed


def test_a_page_without_the_runtime_keeps_its_engine_and_asks_for_nothing_where_there_is_a_gpu(plain):
    found = json.loads(node("--input-type=module", "-e", ALONE, WEB, plain))
    assert found == {"isSame": True, "said": ""}
