"""The weights file to the byte: pages for blocks, cache lines for tensors, and a safetensors file throughout."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.weights_file import ALIGNMENT_BYTES, PAGE_BYTES, write_base


def test_a_small_file_to_the_byte(tmp_path: Path) -> None:
    one, two, three = torch.tensor([1.0, 2.0]), torch.tensor([3, 4], dtype=torch.int8), torch.tensor([5.0])
    placed = write_base(tmp_path / "base", [[("one", one), ("two", two)], [], [("three", three)]])
    content = (tmp_path / "base").read_bytes()
    assert [(p.name, p.offset) for p in placed] == [("one", 4096), ("two", 4096 + 64), ("three", 2 * 4096)]
    assert int.from_bytes(content[:8], "little") == 4096 - 8
    header = json.loads(content[8:4096])
    assert header == {
        "one": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "_fill.0": {"dtype": "U8", "shape": [56], "data_offsets": [8, 64]},
        "two": {"dtype": "I8", "shape": [2], "data_offsets": [64, 66]},
        "_fill.1": {"dtype": "U8", "shape": [4030], "data_offsets": [66, 4096]},
        "three": {"dtype": "F32", "shape": [1], "data_offsets": [4096, 4100]},
    }
    data = one.numpy().tobytes() + bytes(56) + b"\x03\x04" + bytes(4030) + three.numpy().tobytes()
    assert content[4096:] == data


def test_safetensors_reads_what_was_written_turned_tensors_included(tmp_path: Path) -> None:
    dtypes = (torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.bool)
    tensors = {str(d): torch.arange(6).reshape(2, 3).to(d).t() for d in dtypes}
    spans = [list(tensors.items())[:2], list(tensors.items())[2:]]
    placed = write_base(tmp_path / "base", spans)
    found = load_file(tmp_path / "base")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    assert all(p.offset % ALIGNMENT_BYTES == 0 for p in placed)
    assert [p.offset % PAGE_BYTES for p in placed if p.name == spans[1][0][0]] == [0]


def test_contents_come_one_after_the_other_and_must_fit_their_place(tmp_path: Path) -> None:
    laid_out = [[("one", torch.empty(2, device="meta"))], [("two", torch.empty(3, device="meta"))]]

    def contents(*, last: int) -> Iterator[torch.Tensor]:
        yield torch.tensor([1.0, 2.0])
        yield torch.arange(float(last))

    placed = write_base(tmp_path / "base", laid_out, contents=contents(last=3))
    found = load_file(tmp_path / "base")
    assert {p.name: found[p.name].tolist() for p in placed} == {"one": [1.0, 2.0], "two": [0.0, 1.0, 2.0]}
    with pytest.raises(ExportError, match=r"two: torch.float32 \[4\] where F32 \[3\] has its place"):
        write_base(tmp_path / "base", laid_out, contents=contents(last=4))


def test_a_dtype_that_devices_do_not_read_is_refused_by_name(tmp_path: Path) -> None:
    spans = [[("fine", torch.zeros(2))], [("phase", torch.zeros(2, dtype=torch.complex64))]]
    with pytest.raises(ExportError, match=r"phase is torch\.complex64; a device reads"):
        write_base(tmp_path / "base", spans)
    assert list(tmp_path.iterdir()) == []
