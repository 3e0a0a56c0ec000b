"""What the file ``ort-training.json`` of an artifact for ONNX Runtime Training says: one model per number of active layers.

The frozen weights are *inputs* of those models, in the artifact once, and only the trainable parameters are in their checkpoints.
Which layers a model of depth k runs is therefore a matter of what is bound to its k positions.
"""

from pathlib import Path

import msgspec

from fleetune.device_runtime.contracts.artifact import Artifact
from fleetune.device_runtime.errors import ArtifactError, one_line
from fleetune.device_runtime.prepared import prepared

INSTALL = (
    "python -m venv .venv-ort && .venv-ort/bin/pip install onnxruntime-training-cpu==1.19.2 'onnx<1.18' 'numpy<2.3' "
    "torch==2.13.0 'setuptools<81' fleetune tokenizers"
)
"""What makes the environment of ONNX Runtime Training."""
FORMAT = 1
LAYOUT = "ort-training.json"
TRAINING, EVAL, OPTIMIZER, CHECKPOINT = (
    "training_model.onnx",
    "eval_model.onnx",
    "optimizer_model.onnx",
    "checkpoint",
)


class Bound(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an input or parameter is: slot ``index`` of the layer at ``position``; where that is -1, a row of the table."""

    name: str
    position: int
    index: int


class DepthModel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The models of one depth in ``folder``: ``frozen`` are inputs beside the batch, ``trained`` are in the checkpoint."""

    depth: int
    folder: str
    frozen: tuple[Bound, ...]
    trained: tuple[Bound, ...]


class Layout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Every depth there is a model for, lowest first."""

    format: int
    models: tuple[DepthModel, ...]


def read_layout(artifact: Artifact) -> dict[int, DepthModel]:
    """The models by depth.

    Raises:
        ArtifactError: not an artifact of this backend, a newer format, or an index that leads nowhere.
    """
    manifest, path = artifact.manifest, artifact.folder / LAYOUT
    if manifest.backend != "ort-training" or LAYOUT not in manifest.files:
        raise ArtifactError(f"{artifact.folder}: made for {manifest.backend}, not for ort-training")
    try:
        layout = msgspec.json.decode(path.read_bytes(), type=prepared(Layout))
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as exc:
        raise ArtifactError(f"{path}: {one_line(exc)}") from exc
    if layout.format != FORMAT:
        raise ArtifactError(f"{path}: format {layout.format}, this version reads {FORMAT}")
    for model in layout.models:
        _check(model, artifact, path)
    return {model.depth: model for model in layout.models}


def row_of(artifact: Artifact, bound: Bound, layers: tuple[int, ...]) -> int:
    """The row of the tensor table that ``bound`` is when ``layers`` are the active ones."""
    if bound.position < 0:
        return bound.index
    return artifact.manifest.layers[layers[bound.position]].tensors[bound.index]


def _check(model: DepthModel, artifact: Artifact, path: Path) -> None:
    manifest = artifact.manifest
    num_slots = min((len(layer.tensors) for layer in manifest.layers), default=0)
    for name in (TRAINING, EVAL, OPTIMIZER, CHECKPOINT):
        if f"{model.folder}/{name}" not in manifest.files:
            raise ArtifactError(f"{path}: {model.folder}/{name} is used but has no digest")
    for bound in (*model.frozen, *model.trained):
        limit = len(manifest.tensors) if bound.position < 0 else num_slots
        if not (-1 <= bound.position < model.depth <= manifest.num_layers and 0 <= bound.index < limit):
            raise ArtifactError(f"{path}: {bound.name} of depth {model.depth} leads outside the tensor table")
