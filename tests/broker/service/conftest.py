"""A LoRA artifact, opened, and a machine that trains it."""

import pytest
from lora_artifact import lora_artifact

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.training.machine import Machine, Resources


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return open_artifact(lora_artifact(tmp_path_factory.mktemp("lora") / "artifact"))


@pytest.fixture(scope="module")
def machine(artifact, tmp_path_factory):
    with Machine(artifact, Resources(threads=1), folder=tmp_path_factory.mktemp("cache")) as opened:
        yield opened
