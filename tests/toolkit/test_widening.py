"""Checkpoints in half precision, as they are in float32: the same numbers, and nothing else is touched."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fleetune.toolkit.widening import widened

EVERY_16_BITS = torch.arange(-(2**15), 2**15, dtype=torch.int16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_number_of_16_bits_is_the_same_in_32(source: Path, dtype: torch.dtype) -> None:
    half = EVERY_16_BITS.view(dtype)
    save_file({"all": half.reshape(256, 256), "whole": torch.arange(3)}, source / "model.safetensors")
    with widened(str(source), aside=source.parent) as folder:
        found = load_file(Path(folder) / "model.safetensors")
        assert (Path(folder) / "config.json").read_text() == "{}"
    assert found["all"].dtype == torch.float32
    wide = half.float().reshape(256, 256)
    assert torch.equal(found["all"].isnan(), wide.isnan())  # one NaN is as good as another
    numbers = ~wide.isnan()
    assert torch.equal(found["all"][numbers].view(torch.int32), wide[numbers].view(torch.int32))
    assert torch.equal(found["whole"], torch.arange(3))
    assert [path.name for path in source.parent.iterdir()] == ["model"]


def test_pieces_are_put_together_in_their_order(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.toolkit.widening._AT_ONCE_BYTES", 10)
    tensors = {name: torch.randn(7, 3).bfloat16() for name in "cab"}
    save_file(tensors, source / "model-00001-of-00002.safetensors")
    save_file({"d": torch.randn(5).half(), "e": torch.randn(2)}, source / "model-00002-of-00002.safetensors")
    with widened(str(source), aside=source.parent) as folder:
        found = load_file(Path(folder) / "model-00001-of-00002.safetensors")
        assert len(list(Path(folder).glob("*.safetensors"))) == 2
    assert all(torch.equal(found[name], tensor.float()) for name, tensor in tensors.items())


@pytest.mark.parametrize("why", ["fp32", "quantised", "other numbers", "damaged", "not asked", "no folder"])
def test_what_is_not_for_us_to_convert_stays_where_it_is(source: Path, why: str) -> None:
    dtype = torch.float32 if why == "fp32" else torch.bfloat16
    tensors = {"w": torch.ones(4).to(dtype)}
    if why == "other numbers":
        tensors["scale"] = torch.ones(2).to(torch.float8_e4m3fn)
    save_file(tensors, source / "model.safetensors")
    if why == "quantised":
        (source / "config.json").write_text(json.dumps({"quantization_config": {}}))
    if why == "damaged":
        (source / "model.safetensors").write_bytes(b"\xff" * 20)
    given = "org/name" if why == "no folder" else str(source)
    with widened(given, aside=None if why == "not asked" else source.parent) as folder:
        assert folder == given
