"""Puts an artifact folder together, whole or not at all; its manifest is made here, for every backend."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import msgspec

from fleetune.device_runtime.arrays import sha256_of
from fleetune.device_runtime.contracts import manifest
from fleetune.device_runtime.contracts.artifact import (
    CHAT_TEMPLATE,
    GENERATION,
    MANIFEST,
    PREPROCESSOR,
)
from fleetune.device_runtime.errors import ExportError
from fleetune.device_runtime.files import replacing

TOKENIZER = "tokenizer.json"
_PACKAGES = ("fleetune", "torch", "onnx")


@dataclass(frozen=True)
class Description:
    """What the manifest says of the model beside its graphs."""

    name: str
    architecture: str
    task: str
    labels: tuple[str, ...]
    peft: dict[str, Any]
    tokenizer: bytes | None = None
    pad_id: int = 0
    max_length: int = 512
    truncation_side: Literal["left", "right"] = "right"
    chat_template: str = ""
    """Jinja, as transformers has it; empty where the tokenizer has none."""
    special_tokens: dict[str, str] = field(default_factory=dict)
    """By the names that the template knows them by."""
    positions: int | None = None
    """The most tokens that the model has positions for."""
    origin: manifest.Origin = field(default_factory=manifest.Origin)
    licences: dict[str, str] = field(default_factory=dict)
    preprocessor: bytes | None = None
    """How images or sound become what the model takes, as transformers has it in ``preprocessor_config.json``."""
    ends: tuple[int, ...] | None = None
    """Tokens that end a text; None for a model that writes none."""
    problem_type: manifest.ProblemType = ""


class Structure(NamedTuple):
    """What the manifest says of graphs and weights, in the manifest's own terms."""

    inputs: tuple[manifest.Input, ...]
    prelude: manifest.Section
    kinds: tuple[manifest.Kind, ...]
    layers: tuple[manifest.Layer, ...]
    head: manifest.Section
    tensors: tuple[manifest.Tensor, ...]
    hidden_size: int


def check_place(out: Path) -> None:
    """Refuse to write an artifact over what is none.

    Raises:
        ExportError: ``out`` exists and is no artifact.
    """
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an artifact; choose another --out")


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all went well.

    Raises:
        ExportError: ``out`` exists and is no artifact.
    """
    check_place(out)
    with replacing(out) as part:
        yield part


def assemble(
    folder: Path,
    description: Description,
    structure: Structure,
    *,
    backend: str,
    base_dtype: str = "fp32",
    bounds: Mapping[str, int] = MappingProxyType({}),
) -> manifest.Manifest:
    """Write tokenizer, chat template, preprocessor and the manifest with the digests of all in ``folder``; call it last."""
    tokenizer = _write_tokenizer(folder, description)
    if description.preprocessor is not None:
        (folder / PREPROCESSOR).write_bytes(description.preprocessor)
    if description.ends is not None:
        (folder / GENERATION).write_bytes(msgspec.json.encode({"eos_token_id": description.ends}))
    made = manifest.Manifest(
        format=manifest.FORMAT,
        name=description.name,
        architecture=description.architecture,
        task=description.task,
        backend=backend,
        labels=description.labels,
        **structure._asdict(),
        files=digests_of(folder),
        peft=description.peft,
        base_dtype=base_dtype,
        tokenizer=tokenizer,
        origin=description.origin,
        bounds=_with_positions(bounds, description.positions),
        licences=description.licences,
        versions={name: version(name) for name in _PACKAGES},
        problem_type=description.problem_type,
    )
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(made), indent=1))
    return made


def digests_of(folder: Path) -> dict[str, manifest.FileDigest]:
    """Digest and size of every file under ``folder``, by its path inside."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {
        p.relative_to(folder).as_posix(): manifest.FileDigest(sha256_of(p), p.stat().st_size) for p in files
    }


def _write_tokenizer(folder: Path, description: Description) -> manifest.Tokenizer | None:
    if description.tokenizer is None:
        return None
    (folder / TOKENIZER).write_bytes(description.tokenizer)
    if description.chat_template:
        (folder / CHAT_TEMPLATE).write_text(description.chat_template, "utf-8", newline="")
    return manifest.Tokenizer(
        TOKENIZER,
        description.pad_id,
        description.max_length,
        description.truncation_side,
        chat_template=CHAT_TEMPLATE if description.chat_template else "",
        special_tokens=description.special_tokens,
    )


def _with_positions(bounds: Mapping[str, int], positions: int | None) -> dict[str, int]:
    if positions is None:
        return dict(bounds)
    return {**bounds, "seq": min(positions, bounds.get("seq", positions))}
