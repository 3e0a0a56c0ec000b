"""Tensors that slots name are written once, in the file and at the place that their row says."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_models import Classifier, program

from fleetune.device_runtime.contracts.artifact import ADAPTER, BASE
from fleetune.device_runtime.contracts.manifest import Tensor
from fleetune.exporters.model.program import Program
from fleetune.exporters.model.quantize import derive
from fleetune.exporters.tensor_table import OUTSIDE, Slots, write_tensors

MATRIX, LEARNING = "qkv.weight", "down.weight"


def slots(*forms: str) -> Slots:
    names = [f"{MATRIX}{form}" for form in forms or ("",)] + [LEARNING]
    return Slots(["embed.weight"], [[f"blocks.{i}.{n}" for n in names] for i in range(2)], ["head.weight"])


@pytest.fixture
def made() -> Program:
    torch.manual_seed(0)
    return program(Classifier((1.0, 1.0)))


def read(folder: Path, row: Tensor) -> np.ndarray:
    """The tensor at the place that its row says."""
    content = (folder / {"base": BASE, "adapter": ADAPTER}[row.file]).read_bytes()
    flat = np.frombuffer(content, row.dtype, int(np.prod(row.shape)), row.offset)
    return flat.reshape(row.shape)


def test_every_row_leads_to_its_tensor(made: Program, tmp_path: Path) -> None:
    table = write_tensors(tmp_path, made, slots())
    parameters = dict(made.module.named_parameters())
    assert [row.name for row in table.rows if not row.trainable] == [
        "embed.weight",
        "blocks.0.qkv.weight",
        "blocks.1.qkv.weight",
    ]
    for row in table.rows:
        np.testing.assert_array_equal(read(tmp_path, row), parameters[row.name].detach().numpy())
        assert row.trainable == parameters[row.name].requires_grad == (row.file == "adapter")
        assert row.layer == (int(row.name.split(".")[1]) if row.name.startswith("blocks") else OUTSIDE)


def test_slots_find_their_rows(made: Program, tmp_path: Path) -> None:
    table, given = write_tensors(tmp_path, made, slots()), slots()
    for names in (given.prelude, *given.layers, given.head):
        assert [table.rows[i].name for i in table.indices(names)] == names
    assert set(table.stored) == {row.name for row in table.rows}


def test_what_is_tied_is_written_once_under_its_first_name(made: Program, tmp_path: Path) -> None:
    made.module.blocks[1] = made.module.blocks[0]
    table = write_tensors(tmp_path, made, slots())
    assert len(table.rows) == 4
    assert table.indices(slots().layers[0]) == table.indices(slots().layers[1])
    assert {row.layer for row in table.rows} == {OUTSIDE, 0}


def test_names_are_those_of_the_artifact(made: Program, tmp_path: Path) -> None:
    renamed = dataclasses.replace(made, names={"blocks.1.down.weight": "peft.1.down"})
    table = write_tensors(tmp_path, renamed, slots())
    assert table.rows[table.indices(["blocks.1.down.weight"])[0]].name == "peft.1.down"
    assert "blocks.1.down.weight" in table.stored


def test_a_form_is_a_tensor_of_its_own(made: Program, tmp_path: Path) -> None:
    table = write_tensors(tmp_path, made, slots(":int8t", ":scalet"))
    weight = made.module.blocks[1].qkv.weight
    for form, dtype in (("int8t", "int8"), ("scalet", "float32")):
        row = table.rows[table.indices([f"blocks.1.{MATRIX}:{form}"])[0]]
        assert (row.name, row.dtype) == (f"blocks.1.{MATRIX}:{form}", dtype)
        np.testing.assert_array_equal(read(tmp_path, row), derive("w", weight, form).numpy())
