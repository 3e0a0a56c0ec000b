"""Fixtures of the tests of ``web_demo``."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def spoilt_artifacts(tmp_path: Path) -> Callable[[Path, Callable[[Path], object]], Path]:
    """Copies an artifact and spoils the copy."""

    def make(artifact: Path, spoil: Callable[[Path], object]) -> Path:
        folder = Path(shutil.copytree(artifact, tmp_path / "spoilt"))
        spoil(folder)
        return folder

    return make
