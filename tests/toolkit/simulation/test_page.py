"""docs/simulation.md names everything that there is, and its configurations are read as they stand."""

import re

import pytest
from paths import ROOT

from fleetune.device_runtime.options import fields_of
from fleetune.toolkit.simulation.availability import Availability
from fleetune.toolkit.simulation.config import load_config
from fleetune.toolkit.simulation.networks import MODELS
from fleetune.toolkit.simulation.partitions import KINDS
from fleetune.toolkit.simulation.profiles import PROFILES

PAGE = (ROOT / "docs" / "simulation.md").read_text()
BLOCKS = re.findall(r"```toml\n(.*?)```", PAGE, re.DOTALL)


def test_the_configurations_of_the_page_are_read(tmp_path):
    base, arm, own = BLOCKS
    (tmp_path / "base.toml").write_text(base)
    (tmp_path / "suffix.toml").write_text(arm + own)
    assert load_config(tmp_path / "base.toml").partition.alpha == 0.1
    config = load_config(tmp_path / "suffix.toml")
    assert (config.name, config.work.policy.name, config.work.steps) == ("suffix", "suffix", 20)
    assert config.all_profiles["gateway"].slowdown == 3.0


@pytest.mark.parametrize("name", [*KINDS, *PROFILES, *MODELS, *(f.name for f in fields_of(Availability))])
def test_the_page_has_a_line_for_it(name):
    assert re.search(rf"^\| [^|]*`{re.escape(name)}`", PAGE, re.MULTILINE), name


def test_figures_and_sources_of_the_page_are_those_of_the_tables():
    for name, profile in PROFILES.items():
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert profile.source in line
        assert f"{profile.gflops:g}" + "*" * ("gflops" in profile.estimated) in line or profile.slowdown
    for name, model in MODELS.items():
        line = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert model.source in line
        assert f"{model.down_bytes_s * 8e-6:.4g}" in line
