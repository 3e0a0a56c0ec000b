"""Weights in a mapped file leave memory after use; no value changes, and nothing that was written is lost."""

import sys
from pathlib import Path

import pytest
import torch
from plain_models import Classifier, program
from resident import resident_kb
from torch import Tensor, nn
from torch.func import functional_call

from fleetune.exporters.model.mapped import leave, leaving, mapped_files
from fleetune.exporters.writing import Description, write_artifact

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone says which memory is a file's")
SIDE = 512
"""Of the matrices: 1 MiB each."""


def mapped(path: Path, values: Tensor, *, shared: bool = False) -> Tensor:
    path.write_bytes(values.numpy().tobytes())
    return torch.from_file(str(path), shared=shared, size=values.numel()).reshape(values.shape)


@pytest.mark.parametrize("shared", [False, True])
def test_what_is_read_leaves_memory_and_is_the_same_when_read_again(tmp_path: Path, shared: bool) -> None:
    values = torch.randn(SIDE, SIDE)
    tensor = mapped(tmp_path / "w", values, shared=shared)
    assert torch.equal(tensor, values)
    assert resident_kb(tensor) == 1024
    leave([tensor.t()], mapped_files())
    assert resident_kb(tensor) == 0
    assert torch.equal(tensor, values)


def test_what_was_written_stays_though_no_file_has_it(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "w", torch.zeros(SIDE, SIDE))
    tensor[7] = 3.0
    leave([tensor], mapped_files())
    assert (tensor[7] == 3).all()
    of_its_own = torch.full((SIDE, SIDE), 2.0)
    leave([of_its_own], mapped_files())
    assert (of_its_own == 2).all()


def test_a_shared_file_gets_what_was_written(tmp_path: Path) -> None:
    tensor = mapped(tmp_path / "w", torch.zeros(SIDE, SIDE), shared=True)
    tensor[7] = 3.0
    leave([tensor], mapped_files())
    assert resident_kb(tensor) == 0
    assert (tensor[7] == 3).all()


def test_pages_that_are_a_neighbours_too_stay(tmp_path: Path) -> None:
    whole = mapped(tmp_path / "w", torch.randn(4 * 1024))
    whole.sum()
    leave([whole[100 : 3 * 1024], whole[::2], whole[:0]], mapped_files())
    assert resident_kb(whole) == 8


def test_a_module_has_no_weight_in_memory_after_forward_nor_after_backward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(SIDE, SIDE), nn.Tanh(), nn.Linear(SIDE, SIDE)).requires_grad_(False)
    given = torch.randn(3, SIDE, requires_grad=True)
    expected = torch.autograd.grad(module(given).square().sum(), given)[0]
    weights = [module[at].weight for at in (0, 2)]
    for at, weight in enumerate(weights):
        weight.data = mapped(tmp_path / str(at), weight.detach())
        assert weight.sum().isfinite()
    other = mapped(tmp_path / "other", torch.randn(SIDE, SIDE))
    with leaving(module):
        assert [*map(resident_kb, weights)] == [0, 0]
        loss = module(given).square().sum()
        assert [*map(resident_kb, weights)] == [0, 0]
        found = torch.autograd.grad(loss, given)[0]
        assert [*map(resident_kb, weights)] == [0, 0]
        functional_call(module, {"0.weight": other}, given)
        assert resident_kb(other) == 0
    assert torch.equal(found, expected)
    assert not any(part._forward_hooks for part in module.modules())


def test_without_smaps_nothing_leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetune.exporters.model.mapped._SMAPS", tmp_path / "none")
    assert mapped_files() == []


@pytest.mark.parametrize("base_dtype", ["fp32", "fp16"])
def test_no_part_of_an_export_leaves_weights_in_memory(tmp_path: Path, base_dtype: str) -> None:
    module = Classifier((1.0, 1.0))
    table = module.embed.weight
    table.data = mapped(tmp_path / "table", table.detach())  # of one page
    described = Description("plain", "Classifier", "sequence-classification", tuple("abcde"), {})
    seen = {}
    assert table.sum().isfinite()
    write_artifact(
        program(module),
        described,
        tmp_path / "artifact",
        base_dtype=base_dtype,
        on_progress=lambda line: seen.update({line: resident_kb(table)}),
    )
    assert seen.pop("finding the blocks") == 0
    assert seen == dict.fromkeys(seen, 0)
    assert len(seen) == 3
    assert resident_kb(table) == 0
