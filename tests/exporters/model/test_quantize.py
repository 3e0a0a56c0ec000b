"""Frozen weights as fp16 and int8: what is stored, what is computed with it, and what is refused."""

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch
from plain_models import CLASSES, WIDTH, Classifier, program

from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.device_runtime.contracts.artifact import BASE, MANIFEST, open_artifact
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.errors import ConfigError, ExportError
from fleetune.exporters.assembly import digests_of
from fleetune.exporters.model import golden, quantize
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import torch_step
from fleetune.exporters.model.program import Program
from fleetune.exporters.model.quantize import (
    FORMS,
    LARGEST,
    derive,
    is_finite,
    rounded,
    split_form,
    with_forms,
)
from fleetune.exporters.storages import check_base_dtype
from fleetune.exporters.writing import Description, write_artifact

SCALES = (0.25, 0.25, 0.5, 0.25)


@pytest.fixture(scope="module", params=["fp16", "int8"])
def stored(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Program]:
    folder = tmp_path_factory.mktemp(request.param) / "artifact"
    return request.param, folder, export(Classifier(SCALES), folder, request.param)


def export(module: Classifier, out: Path, base_dtype: str) -> Program:
    made = program(module)
    labels = tuple("abcde")[:CLASSES]
    described = Description("plain", "Classifier", "sequence-classification", labels, {})
    write_artifact(made, described, out, base_dtype=base_dtype)
    return made


def test_the_device_repeats_the_rounded_step(stored: tuple[str, Path, Program]) -> None:
    base_dtype, folder, _ = stored
    report = selfcheck(folder)
    assert report.ok
    assert report.limit == {"fp16": 1e-4, "int8": 5e-2}[base_dtype]
    assert report.max_relative_error < {"fp16": 1e-5, "int8": 1e-3}[base_dtype]
    assert open_artifact(folder).manifest.base_dtype == base_dtype


def test_of_many_plans_with_large_logits_the_first_two_have_them_and_the_rest_is_checked_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(golden, "_ALL_LOGITS_BYTES", 1)
    export(Classifier(SCALES), tmp_path / "artifact", "int8")
    report = selfcheck(tmp_path / "artifact")
    assert report.ok
    kept = {name.partition(".")[0] for name in report.tensors if name.endswith(".logits")}
    assert kept == {"layer0", "layer1"}
    assert {f"layer{i}.loss" for i in range(4)} < report.tensors.keys()
    assert {f"layer{i}.recompute.grad.head.weight" for i in range(4)} < report.tensors.keys()


@pytest.mark.parametrize("factor", [0.9, pytest.param(-1.0, marks=pytest.mark.slow)])
def test_a_wrong_scale_of_one_layer_is_found(tmp_path: Path, factor: float) -> None:
    folder = tmp_path / "artifact"
    export(Classifier(SCALES), folder, "int8")
    manifest = open_artifact(folder).manifest
    row = next(t for t in manifest.tensors if t.name == "blocks.2.qkv.weight:scalet")
    held = np.memmap(folder / BASE, np.float32, "r+", row.offset, row.shape)
    held *= np.float32(factor)
    held.flush()
    (folder / MANIFEST).unlink()
    files = digests_of(folder)
    (folder / MANIFEST).write_bytes(msgspec.json.encode(msgspec.structs.replace(manifest, files=files)))
    report = selfcheck(folder)
    assert not report.ok
    wrong = {name.partition(".")[0] for name, error in report.tensors.items() if error > report.limit}
    assert wrong == {"layer2"}


def test_what_is_stored_is_what_the_form_promises(stored: tuple[str, Path, Program]) -> None:
    base_dtype, folder, made = stored
    artifact = open_artifact(folder)
    tensors = dict(made.module.named_parameters())
    for row in (t for t in artifact.manifest.tensors if not t.trainable):
        name, form = split_form(row.name)
        np.testing.assert_array_equal(artifact.base(row), derive(name, tensors[name], form).detach().numpy())
    frozen = {t.name: t.dtype for t in artifact.manifest.tensors if not t.trainable and t.layer == 0}
    if base_dtype == "fp16":
        assert set(frozen.values()) == {"float16"}
    else:
        matrix = {n: d for n, d in frozen.items() if "qkv.weight" in n}
        assert matrix == {
            "blocks.0.qkv.weight:int8t": "int8",
            "blocks.0.qkv.weight:scalet": "float32",
        }


def test_the_module_is_left_as_it_was(tmp_path: Path) -> None:
    module = Classifier(SCALES)
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    export(module, tmp_path / "artifact", "int8")
    assert all(torch.equal(p, before[n]) for n, p in module.named_parameters())


@pytest.mark.parametrize(("batch", "seq"), [(1, 1), (5, 21)])
def test_any_size_is_near_torch_with_the_original_weights(
    stored: tuple[str, Path, Program], batch: int, seq: int
) -> None:
    base_dtype, folder, made = stored
    artifact = open_artifact(folder, verify=False)
    data = made.make_batch(batch, seq)
    expected = torch_step(made, find_anatomy(made, batch=3, seq=7), data)
    with open_engine(artifact) as stack:
        result = stack.step({n: v.numpy() for n, v in data.items()}, full(4), artifact.adapter())
    bound = {"fp16": 5e-3, "int8": 0.05}[base_dtype]
    for name, gradient in result.grads.items():
        wanted = expected[f"grad.{name}"].numpy()
        assert np.linalg.norm(gradient - wanted) <= bound * np.linalg.norm(wanted) + 1e-7, name


@pytest.mark.parametrize("shape", [(WIDTH, 3 * WIDTH), (1, 7), (5, 1)])
def test_int8_is_within_half_a_step_of_each_channel(shape: tuple[int, int]) -> None:
    torch.manual_seed(1)
    matrix = torch.randn(shape) * torch.logspace(-4, 3, shape[1])
    scale = derive("w", matrix, "scale")
    found = derive("w", matrix, "int8")
    assert found.dtype == torch.int8
    assert ((found * scale - matrix).abs() <= 0.5001 * scale).all()
    assert torch.equal(derive("w", matrix.t(), "int8t"), found)
    assert torch.equal(derive("w", matrix.t(), "scalet"), scale)


def test_two_products_with_uint8_fit_in_16_bits() -> None:
    matrix = torch.randn(8, 7) * torch.logspace(-4, 3, 7)
    assert derive("w", matrix, "int8").abs().amax(0).tolist() == [LARGEST] * 7
    assert 2 * 255 * LARGEST < 2**15 <= 2 * 255 * (LARGEST + 1)


def test_a_column_of_zeros_stays_zero() -> None:
    matrix = torch.zeros(4, 2)
    assert torch.equal(derive("w", matrix, "int8") * derive("w", matrix, "scale"), matrix)


def test_rounded_gives_the_tensors_back_after_an_error() -> None:
    weight = torch.randn(4, 6)
    before = weight.clone()
    inside = []

    def fail() -> None:
        with rounded({"w": weight}, ["w:int8t", "w:scalet"]):
            inside.append(weight.clone())
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not torch.equal(inside[0], before)
    assert torch.allclose(inside[0], before, atol=0.02)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("form", ["fp16", "rows", "int4"])
@pytest.mark.parametrize("at_once", [1, 200, 10**6])
def test_a_tensor_is_rounded_some_rows_at_a_time_as_whole_and_comes_back(
    monkeypatch: pytest.MonkeyPatch, form: str, at_once: int
) -> None:
    matrix = torch.randn(7, 64, generator=torch.Generator().manual_seed(0))
    turned = matrix.t().clone().t()  # not contiguous
    whole = {"fp16": matrix.half().float()}.get(form)
    if form == "rows":
        whole = derive("w", matrix, "rows") * derive("w", matrix, "rowscale")[:, None]
    monkeypatch.setattr(quantize, "_AT_ONCE", at_once)
    places = [tensor.data_ptr() for tensor in (matrix, turned)]
    before = matrix.clone()
    with rounded({"w": matrix, "v": turned}, [f"w:{form}", f"v:{form}"]):
        assert torch.equal(matrix, turned)
        if whole is None:
            steps = (matrix.reshape(7, 2, 32) / derive("w", before, "int4scale")).round()
            assert steps.min() == -8
            assert steps.max() <= 7
        else:
            assert torch.equal(matrix, whole)
    assert torch.equal(matrix, before)
    assert torch.equal(turned, before)
    assert [tensor.data_ptr() for tensor in (matrix, turned)] == places


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0.0, 3e38, -3e38], True), ([], True), ([1.0, float("nan")], False), ([1.0, -float("inf")], False)],
)
def test_what_is_not_finite_is_found(values: list[float], expected: bool) -> None:
    assert is_finite(torch.tensor(values)) == expected


def test_the_forms_of_slots_are_found_again() -> None:
    slots = with_forms(["a", "b"])
    assert len(slots) == 2 * len(FORMS)
    assert slots[FORMS.index("int8t") * 2 + 1] == "b:int8t"
    assert [split_form(s) for s in ("a", "b:scale")] == [("a", ""), ("b", "scale")]


@pytest.mark.parametrize(("form", "value"), [("fp16", 7e4), ("fp16", float("inf")), ("int8", float("nan"))])
def test_values_that_a_form_cannot_hold_are_refused_by_name(form: str, value: float) -> None:
    with pytest.raises(ExportError, match=r"layer\.weight: holds"):
        derive("layer.weight", torch.tensor([[1.0, value]]), form)


def test_a_storage_that_the_runtime_does_not_take_is_refused() -> None:
    with pytest.raises(
        ExportError, match="--base-dtype int8: the executorch runtime does not take it; it takes fp32"
    ):
        check_base_dtype("int8", backend="executorch")
    with pytest.raises(ConfigError, match="--base-dtype int3: no such storage; have: fp16, fp32, int4, int8"):
        check_base_dtype("int3", backend="onnx")
