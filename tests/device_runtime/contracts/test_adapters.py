import json

import numpy as np
import pytest

from fleetune.device_runtime.contracts.adapters import load_peft, read_peft, save_peft, write_peft
from fleetune.device_runtime.errors import ArtifactError


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
