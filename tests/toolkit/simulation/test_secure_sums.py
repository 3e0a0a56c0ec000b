"""Sums under masks in a simulated fleet: the same adapter as on the bare grid, later by two words there and back a round."""

import pytest
from simulated import FILE, run, write_config


def test_a_simulated_fleet_masks_as_a_real_one(tmp_path):
    pytest.importorskip("cryptography")
    found = {}
    for how in ("grid", "masks"):
        path = write_config(tmp_path / how, FILE + f'[job]\nsecure = "{how}"\nmin_clients = 3\n')
        report = run(path, "out")
        adapter = (tmp_path / how / "out" / "adapter" / "adapter_model.safetensors").read_bytes()
        found[how] = (adapter, report.time_s, report.up.protocol)
    assert found["masks"][0] == found["grid"][0]
    assert found["masks"][1] - found["grid"][1] == pytest.approx(3 * 2 * 0.25, abs=0.01)
    assert found["masks"][2] > found["grid"][2]
