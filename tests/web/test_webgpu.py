"""The page on WebGPU, on an adapter in software: right or wrong can be told there, fast or slow cannot."""

import json

import pytest
from browser import CHROMIUM, needs_browser
from node_web import needs_page, needs_web, run

from fleetune.toolkit.web import serving

pytestmark = [
    needs_web,
    pytest.mark.slow,
    needs_browser,
    needs_page("ort.webgpu.min.mjs"),
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
