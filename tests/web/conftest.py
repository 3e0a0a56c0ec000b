"""Fixtures of the tests of ``web_demo``."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetune.device_runtime.commands.sign import sign
from fleetune.device_runtime.network.signing import write_key_pair


@pytest.fixture
def spoilt_artifacts(tmp_path: Path) -> Callable[[Path, Callable[[Path], object]], Path]:
    """Copies an artifact and spoils the copy."""

    def make(artifact: Path, spoil: Callable[[Path], object]) -> Path:
        folder = Path(shutil.copytree(artifact, tmp_path / "spoilt"))
        spoil(folder)
        return folder

    return make


@pytest.fixture
def signed_artifact(
    word_artifact: Path, tmp_path: Path, spoilt_artifacts: Callable[[Path, Callable[[Path], object]], Path]
) -> Path:
    """An artifact that the key in ``tmp_path / "key"`` signed; its public key is ``key.pub`` there."""
    write_key_pair(tmp_path / "key", tmp_path / "key.pub")
    return spoilt_artifacts(word_artifact, lambda folder: sign(folder, sign_key=tmp_path / "key"))
