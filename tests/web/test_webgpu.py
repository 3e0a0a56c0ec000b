"""The page on WebGPU, on an adapter in software: right or wrong can be told there, fast or slow cannot."""

import json
import shutil
from pathlib import Path

import pytest
from browser import CHROMIUM, needs_browser
from node_web import needs_page, needs_web, run

from fleetune.toolkit.web import PAGE, serving

pytestmark = [needs_web, pytest.mark.slow, needs_browser]


def looked_at(folder: Path, artifact: Path, page: Path):
    """What a page says of WebGPU; the test is skipped where this Chromium gives no software adapter."""
    path = folder / "gpu.json"
    with serving(artifact, page=page) as (url, _):
        path.write_text(json.dumps({"url": url, "profile": str(folder / "profile"), "chromium": CHROMIUM}))
        found = run("gpu.mjs", path)
    if not found["has"]:
        pytest.skip("this Chromium gives no software adapter of WebGPU")
    assert found["trouble"] == ""
    assert not found["isFetchedBefore"]
    return found


@needs_page("ort.webgpu.min.mjs")
def test_the_golden_step_is_right_and_its_runtime_is_fetched_only_when_it_is_looked_at(
    word_artifact, tmp_path
):
    found = looked_at(tmp_path, word_artifact, PAGE)
    assert found["count"] == 40
    assert found["worst"] < 1e-4
    assert found["chosen"].startswith(("WebGPU is slower: a step takes", "WebGPU: a step takes"))


@needs_page()
def test_a_page_that_is_built_without_the_runtime_says_nothing_of_it(word_artifact, tmp_path):
    page = shutil.copytree(
        PAGE, tmp_path / "page", ignore=shutil.ignore_patterns("ort.webgpu.*", "*.asyncify.*")
    )
    assert looked_at(tmp_path, word_artifact, page)["chosen"] == ""
