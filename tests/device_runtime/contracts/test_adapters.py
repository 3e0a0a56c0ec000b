import json
import re
import sys

import numpy as np
import pytest

from fleetune.device_runtime.arrays import save_arrays
from fleetune.device_runtime.contracts.adapters import load_peft, read_peft, save_peft, write_peft
from fleetune.device_runtime.errors import ArtifactError, StateError


@pytest.fixture
def manifest(make_manifest):
    return make_manifest()


@pytest.fixture
def arrays(linear_stack, manifest):
    return linear_stack(manifest).adapter()


def test_a_folder_comes_back_to_the_bit(tmp_path, manifest, arrays):
    folder = tmp_path / "new" / "adapter"
    save_peft(folder, manifest, arrays)
    found = load_peft(folder, manifest)
    assert found.keys() == arrays.keys()
    assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
    assert json.loads((folder / "adapter_config.json").read_text()) == manifest.peft
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "fleetune.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    found["head.w"] += 1  # writable


def as_bfloat16(array):
    """Its upper half, cut: what is stored is a value of bfloat16."""
    return (array.view(np.uint32) >> 16).astype(np.uint16)


def save_bfloat16(path, arrays):
    save_arrays(path, {name: as_bfloat16(array) for name, array in arrays.items()})
    path.write_bytes(retyped(path.read_bytes()))


def retyped(content):
    size = int.from_bytes(content[:8], "little")
    header = content[8 : 8 + size].replace(b'"U16"', b'"BF16"')
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def test_half_precision_is_widened(tmp_path, manifest, arrays, monkeypatch):
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    save_peft(tmp_path, manifest, arrays)
    path = tmp_path / "adapter_model.safetensors"
    save_bfloat16(path, arrays)
    for name, found in load_peft(tmp_path, manifest).items():
        assert found.dtype == np.float32
        assert np.array_equal(found.view(np.uint32), arrays[name].view(np.uint32) & 0xFFFF0000)
    for dtype in (np.float16, np.float64):
        stored = {name: array.astype(dtype) for name, array in arrays.items()}
        save_arrays(path, stored)
        found = load_peft(tmp_path, manifest)
        assert {array.dtype for array in found.values()} == {np.dtype(np.float32)}
        assert all(np.array_equal(found[name], stored[name].astype(np.float32)) for name in arrays)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e300])
def test_what_is_not_finite_is_named(tmp_path, manifest, arrays, value):
    save_peft(tmp_path, manifest, arrays)
    arrays = {name: array.astype(np.float64) for name, array in arrays.items()}
    arrays["layer1.a"][0, 0] = value
    save_arrays(tmp_path / "adapter_model.safetensors", arrays)
    with pytest.raises(ArtifactError, match=r"adapter holds NaN or infinity: layer1\.a$"):
        load_peft(tmp_path, manifest)


def test_integers_are_no_adapter(tmp_path, manifest, arrays):
    save_peft(tmp_path, manifest, arrays)
    arrays["head.w"] = arrays["head.w"].astype(np.int64)
    save_arrays(tmp_path / "adapter_model.safetensors", arrays)
    with pytest.raises(ArtifactError, match=r"head\.w: expected float32\[8, 3\], got int64\[8, 3\]"):
        load_peft(tmp_path, manifest)


def test_a_pickle_is_not_read_and_the_next_step_is_named(tmp_path, manifest):
    (tmp_path / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    with pytest.raises(
        ArtifactError, match=r"adapter_model\.bin is a pickle, .* is not read; .*save_pretrained"
    ):
        load_peft(tmp_path, manifest)


def test_a_misfit_is_refused_before_it_is_written(tmp_path, manifest, arrays):
    arrays["extra"] = arrays.pop("head.w")
    with pytest.raises(ArtifactError, match=r"extra: not in the artifact; head\.w: missing"):
        save_peft(tmp_path / "adapter", manifest, arrays)
    assert not (tmp_path / "adapter").exists()


def test_an_adapter_of_another_model_or_scale_is_refused(tmp_path, manifest, make_manifest, arrays):
    save_peft(tmp_path, manifest, arrays)
    with pytest.raises(ArtifactError, match=r"layer2\.a: not in the artifact"):
        load_peft(tmp_path, make_manifest(num_layers=2))
    with pytest.raises(ArtifactError, match="lora_alpha: expected 32, got 16"):
        load_peft(tmp_path, make_manifest(peft={"r": 8, "lora_alpha": 32}))


@pytest.mark.parametrize(
    ("theirs", "said"),
    [
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": {"value": 64}}, "alpha_pattern: expected {}, got {'value': 64}"),
        ({"r": 8, "lora_alpha": 16, "use_rslora": True}, "use_rslora: expected False, got True"),
        ({"r": 8}, "lora_alpha: expected 16, got 8"),
        ({"r": 8, "lora_alpha": 16, "alpha_pattern": None, "use_rslora": None}, ""),
    ],
)  # fmt: skip
def test_a_scale_that_a_file_does_not_name_is_pefts_own(tmp_path, manifest, arrays, theirs, said):
    """A file of before PEFT had the setting lacks it, and no tensor shows that the scale is another."""
    write_peft(tmp_path, theirs, arrays)
    if not said:
        assert load_peft(tmp_path, manifest).keys() == arrays.keys()
        return
    with pytest.raises(ArtifactError, match=re.escape(said)):
        load_peft(tmp_path, manifest)


def test_what_is_no_adapter_folder_is_refused(tmp_path, manifest, arrays):
    with pytest.raises(ArtifactError, match="no PEFT adapter here"):
        load_peft(tmp_path, manifest)
    save_peft(tmp_path, manifest, arrays)
    (tmp_path / "adapter_config.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"adapter_config\.json: cannot be read"):
        load_peft(tmp_path, manifest)
    (tmp_path / "adapter_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ArtifactError, match=r"adapter_model\.safetensors: cannot be read as safetensors"):
        load_peft(tmp_path, manifest)


def test_configuration_and_tensors_come_back_as_they_were_written(tmp_path, arrays):
    config = {"peft_type": "LORA", "r": 4, "rank_pattern": {"a.b": 2}, "target_modules": None}
    write_peft(tmp_path / "adapter", config, arrays)
    found, tensors = read_peft(tmp_path / "adapter")
    assert found == config
    assert tensors.keys() == arrays.keys()
    assert all(np.array_equal(tensors[name], arrays[name]) for name in arrays)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, arrays):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(StateError, match=r"taken: cannot be written: "):
        write_peft(tmp_path / "taken", {}, arrays)
