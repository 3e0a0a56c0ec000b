"""The committed artifact of the engine's tests is what its script makes, as far as versions and processors let bytes agree."""

import msgspec
import numpy as np
import pytest
from make_tiny_artifact import FOLDER, make

from fleetune.device_runtime.arrays import load_arrays
from fleetune.device_runtime.contracts.artifact import ADAPTER, BASE, GOLDEN, open_artifact

FLOATS = (BASE, ADAPTER, GOLDEN)
"""What another processor may round another way."""


def test_making_it_again_makes_the_same(tmp_path) -> None:
    make(tmp_path / "artifact")
    again, kept = open_artifact(tmp_path / "artifact"), open_artifact(FOLDER)
    if again.manifest.versions != kept.manifest.versions:
        pytest.skip(f"made by {kept.manifest.versions}, here are {again.manifest.versions}")
    same = {n: d for n, d in kept.manifest.files.items() if n not in FLOATS}
    assert {n: d for n, d in again.manifest.files.items() if n not in FLOATS} == same
    without = [msgspec.structs.replace(a.manifest, files={}) for a in (again, kept)]
    assert without[0] == without[1]
    for name in FLOATS:
        made, expected = load_arrays(again.folder / name), load_arrays(FOLDER / name)
        assert made.keys() == expected.keys()
        for tensor, array in expected.items():
            np.testing.assert_allclose(made[tensor], array, rtol=1e-5, atol=1e-6, err_msg=tensor)


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 120_000
