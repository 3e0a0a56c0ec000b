"""An artifact made of a transformer that no library knows."""

from pathlib import Path

import pytest
import torch
from plain_models import Classifier, export

from fleetune.exporters.model.program import Program


@pytest.fixture(scope="session")
def classifier(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Program]:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("plain") / "artifact"
    return folder, export(Classifier((0.25, 0.25, 0.5, 0.25)), folder)
