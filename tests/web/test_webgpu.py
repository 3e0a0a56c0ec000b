"""The page on WebGPU, on an adapter in software: right or wrong can be told there, fast or slow cannot."""

import json
import shutil

import pytest
from node_web import needs_web, run

from fleetune.toolkit.web import PAGE, serving

CHROMIUM = shutil.which("chromium")
pytestmark = [
    needs_web,
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed"),
    pytest.mark.skipif(not (PAGE / "ort.webgpu.min.mjs").is_file(), reason="the page is not built: make web"),
]


def test_the_golden_step_is_right_and_its_runtime_is_fetched_only_when_it_is_looked_at(
    word_artifact, tmp_path
):
    path = tmp_path / "gpu.json"
    with serving(word_artifact) as (url, _):
        path.write_text(json.dumps({"url": url, "profile": str(tmp_path / "profile"), "chromium": CHROMIUM}))
        found = run("gpu.mjs", path)
    if not found["has"]:
        pytest.skip("this Chromium gives no software adapter of WebGPU")
    assert found["trouble"] == ""
    assert not found["isFetchedBefore"]
    assert found["count"] == 40
    assert found["worst"] < 1e-4
    assert found["chosen"].startswith(("WebGPU is slower: a step takes", "WebGPU: a step takes"))
