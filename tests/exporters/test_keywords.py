"""A published audio keyword transformer, a plain module: its weights answer right, and it exports and trains exactly."""

import numpy as np
import pytest
from keywords import LABELS, LAYERS, features_of, keyword_program, keyword_weights

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.commands.selfcheck import relative_error, selfcheck
from fleetune.device_runtime.contracts.artifact import Artifact, open_artifact
from fleetune.device_runtime.contracts.plans import dropping, full
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.exporters.model.anatomy import find_anatomy
from fleetune.exporters.model.golden import torch_step
from fleetune.exporters.writing import Description, write_artifact

pytestmark = pytest.mark.shared_data
RECORDINGS = {"yes.wav": "yes", "no.wav": "no", "silence.wav": "_silence_"}


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("keywords") / "artifact"
    description = Description("kwt1", "KeywordTransformer", "image-classification", LABELS, {})
    write_artifact(keyword_program(keyword_weights()), description, folder)
    return open_artifact(folder)


def test_twelve_layers_of_one_kind_replay_the_golden_step(artifact: Artifact) -> None:
    assert [layer.kind for layer in artifact.manifest.layers] == [0] * LAYERS
    assert selfcheck(artifact.folder).max_relative_error < 1e-4


@pytest.mark.parametrize("batch_size", [1, 6])
def test_any_batch_size_equals_torch(artifact: Artifact, batch_size: int) -> None:
    made = keyword_program(keyword_weights())
    batch = made.make_batch(batch_size, 0)
    dropped = (1, 4, 11)
    expected = torch_step(made, find_anatomy(made, batch=3, seq=0), batch, dropped=dropped)
    with open_engine(artifact) as stack:
        result = stack.step(
            {n: t.numpy() for n, t in batch.items()}, dropping(LAYERS, dropped), artifact.adapter()
        )
    assert result.loss == pytest.approx(expected["loss"].item(), rel=1e-5)
    assert {f"grad.{n}" for n in result.grads} == expected.keys() - {"loss", "logits"}
    for name, gradient in result.grads.items():
        assert relative_error(gradient, expected[f"grad.{name}"].numpy()) < 1e-4, name


def test_recordings_are_heard_and_a_word_is_learned(artifact: Artifact) -> None:
    """Gradient steps teach the device that this recording of *no* means *stop*."""
    weights = keyword_weights()
    adapter: Arrays = artifact.adapter()
    with open_engine(artifact) as stack:
        for recording, word in RECORDINGS.items():
            logits = stack.predict({"mfcc": features_of(recording, weights)}, adapter)
            assert LABELS[int(logits.argmax())] == word
        batch = {"mfcc": features_of("no.wav", weights), "labels": np.array([LABELS.index("stop")])}
        losses = []
        for _ in range(20):
            result = stack.step(batch, full(LAYERS), adapter)
            adapter = {n: w - 0.1 * result.grads[n] for n, w in adapter.items()}
            losses.append(result.loss)
        assert losses[0] > 2 > 0.5 > losses[-1]
        assert LABELS[int(stack.predict({"mfcc": batch["mfcc"]}, adapter).argmax())] == "stop"
