"""The artifact folder: refuse first, then read; frozen weights are memory-mapped, never copied."""

import hashlib
import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Array, Arrays, Floats, load_arrays, sha256_of
from fleetune.device_runtime.contracts.graph_file import graph_problems
from fleetune.device_runtime.contracts.manifest import FORMAT, Kind, Manifest, Section, Targets, Tensor
from fleetune.device_runtime.contracts.soundness import table_problems
from fleetune.device_runtime.errors import ArtifactError, one_line, some
from fleetune.device_runtime.prepared import prepared

MANIFEST = "manifest.json"
BASE = "base.safetensors"
ADAPTER = "adapter.safetensors"
GOLDEN = "golden.safetensors"
CHAT_TEMPLATE = "chat_template.jinja"
PREPROCESSOR = "preprocessor_config.json"
"""How images or sound become what the model takes, as transformers has it; only of a model that came with it."""
GENERATION = "generation_config.json"
"""Which tokens end a text, as transformers has it; only of a language model."""
NOISE_STEP = 2.0**-11
"""What one unit of a golden step's ``noise.*`` (int8) stands for; exact in float32, so every machine adds the same."""
_MANIFEST_BYTES_MAX = 64 * 1024**2
_COUNTED_BEFORE = {"causal-lm": Targets(shift=1, ignored=-100)}
"""What a loss was a mean over by its task, where the manifest does not say; all other tasks: every label but -100."""


class _FormatOnly(msgspec.Struct):
    format: int


@dataclass(frozen=True)
class Artifact:
    """An opened artifact. ``digest`` is the SHA-256 of its manifest, which fixes every other file."""

    folder: Path
    manifest: Manifest
    digest: str
    _mapped: mmap.mmap

    def base(self, tensor: Tensor) -> Array:
        """The frozen tensor as a read-only view of the mapped file; no byte of it is read yet."""
        count = int(np.prod(tensor.shape, dtype=np.int64))
        view = np.frombuffer(self._mapped, dtype=tensor.dtype, count=count, offset=tensor.offset)
        return view.reshape(tensor.shape)

    def fetch(self, start: int, end: int) -> None:
        """Have bytes of the mapped file read ahead; does not wait, and is a hint where the system knows none."""
        self._advise("MADV_WILLNEED", start, end)

    def release(self, start: int, end: int) -> None:
        """Let bytes of the mapped file leave resident memory until they are read again."""
        self._advise("MADV_DONTNEED", start, end)

    def scatter(self, start: int, end: int) -> None:
        """Say that of these bytes a place here and there is read: what is cached around is dropped, reads bring in little.

        Pages of a file that was just written, or read from end to end, are cached 2 MiB at a time, and mapped so too.
        """
        self._advise("MADV_RANDOM", start, end)
        if hasattr(os, "posix_fadvise"):
            with (self.folder / BASE).open("rb") as file:
                os.fsync(file.fileno())  # only what is on the disk can be dropped
                os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_DONTNEED)

    def _advise(self, advice: str, start: int, end: int) -> None:
        if hasattr(mmap, advice):
            first = start - start % mmap.PAGESIZE
            self._mapped.madvise(getattr(mmap, advice), first, end - first)

    def adapter(self) -> Arrays:
        """Version 0 of the trainable tensors, by name, in memory and writable; ArtifactError as of :func:`fit_adapter`."""
        return fit_adapter(self.manifest, load_arrays(self.folder / ADAPTER))


def open_artifact(folder: Path | str, *, verify: bool = True) -> Artifact:
    """Open an artifact.

    Args:
        folder: where ``manifest.json`` is.
        verify: hash every file; without it only sizes are compared. What graphs are made of is looked at either way.

    Raises:
        ArtifactError: not an artifact, a newer format, int8 weights of format 1, a path outside the folder, files that
            differ, or a graph that names a file, holds a loop or runs somebody else's operators (all listed).
    """
    folder = Path(folder)
    content = _read_manifest(folder)
    manifest = _parse(content, folder)
    base_bytes = manifest.files[BASE].size_bytes if BASE in manifest.files else 0
    problems = [*_path_problems(manifest), *table_problems(manifest, base_bytes=base_bytes)]
    if not problems:
        problems = _all_file_problems(folder, manifest, verify=verify)
    if problems:
        raise ArtifactError(f"{folder}: " + "; ".join(problems))
    return Artifact(folder, manifest, hashlib.sha256(content).hexdigest(), _mapped(folder / BASE))


def fit_adapter(manifest: Manifest, arrays: Arrays) -> Arrays:
    """Arrays of any float dtype as the trainable tensors, in their dtype, float32.

    Raises:
        ArtifactError: they are not exactly the trainable tensors, or hold NaN or infinity (every difference listed).
    """
    dtypes = {t.name: np.dtype(t.dtype) for t in manifest.trainable}
    with np.errstate(over="ignore"):  # found below, with a message
        fitted = {name: _as_float(array, dtypes.get(name)) for name, array in arrays.items()}
    check_adapter(manifest, fitted)
    if bad := [name for name in sorted(fitted) if not _is_finite(fitted[name])]:
        raise ArtifactError(f"adapter holds NaN or infinity: {', '.join(bad)}")
    return fitted


def _as_float(array: Array, dtype: np.dtype[Any] | None) -> Array:
    is_float = dtype is not None and dtype.kind == array.dtype.kind == "f"
    return array.astype(dtype, copy=False) if is_float else array


def _is_finite(array: Array) -> bool:
    floats: Floats = array.astype(np.float32, copy=False)
    return bool(np.isfinite(floats).all())


def check_adapter(manifest: Manifest, arrays: Arrays) -> None:
    """Raise ArtifactError unless ``arrays`` are exactly the trainable tensors (every difference listed)."""
    wanted = {t.name: t for t in manifest.trainable}
    problems = [f"{n}: not in the artifact" for n in sorted(arrays.keys() - wanted)]
    problems += [f"{n}: missing" for n in sorted(wanted.keys() - arrays)]
    for name in sorted(wanted.keys() & arrays):
        want, got = wanted[name], arrays[name]
        if got.shape != want.shape or got.dtype != np.dtype(want.dtype):
            problems.append(
                f"{name}: expected {want.dtype}{list(want.shape)}, got {got.dtype}{list(got.shape)}"
            )
    if problems:
        raise ArtifactError("adapter does not fit: " + "; ".join(problems))


def _read_manifest(folder: Path) -> bytes:
    path = folder / MANIFEST
    try:
        if path.stat().st_size > _MANIFEST_BYTES_MAX:
            raise ArtifactError(f"{path}: larger than {_MANIFEST_BYTES_MAX} bytes")
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as exc:
        raise ArtifactError(
            f"{folder}: no artifact here (no {MANIFEST}); make one with `fleetune export`"
        ) from exc
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{path}: {getattr(exc, 'strerror', None) or exc}") from exc


def _parse(content: bytes, folder: Path) -> Manifest:
    try:
        found = msgspec.json.decode(content, type=prepared(_FormatOnly)).format
        if found > FORMAT:
            raise ArtifactError(
                f"{folder}: format {found} is newer than {FORMAT}, which this version reads; update fleetune"
            )
        if found < FORMAT:
            return _counting(_upgraded(msgspec.json.decode(content), folder))
        return _counting(_decoder.decode(content))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, TypeError) as exc:
        raise ArtifactError(f"{folder / MANIFEST}: {one_line(exc)}") from exc


_decoder = msgspec.json.Decoder(prepared(Manifest))
"""Made when this is imported: msgspec crashes where two threads are the first to meet a struct."""


def _upgraded(found: dict[str, Any], folder: Path) -> Manifest:
    """Turn a manifest of format 1 into today's; the file stays as it is, and so does the artifact's digest.

    Raises:
        ArtifactError: its int8 weights are beyond what every processor multiplies rightly.
    """
    if found.get("base_dtype") == "int8":
        raise ArtifactError(
            f"{folder}: export again with --base-dtype int8: the int8 products of format 1 are wrong on processors without VNNI"
        )
    manifest = msgspec.convert(found | {"format": FORMAT}, prepared(Manifest))
    inputs = tuple(
        msgspec.structs.replace(row, role="labels")
        if row.name == "labels"
        else row  # known by name alone then
        for row in manifest.inputs
    )
    return msgspec.structs.replace(manifest, inputs=inputs)


def _counting(manifest: Manifest) -> Manifest:
    """With what its loss is a mean over, which manifests did not always say."""
    if manifest.head.counted:
        return manifest
    counted = _COUNTED_BEFORE.get(manifest.task, Targets(shift=0, ignored=-100))
    return msgspec.structs.replace(manifest, head=msgspec.structs.replace(manifest.head, counted=counted))


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as exc:
        raise ArtifactError(f"{path}: cannot be mapped: {exc}") from exc


def _path_problems(manifest: Manifest) -> Iterable[str]:
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or not path.parts:
            yield f"path {name!r} leads outside the folder"
    for required in (BASE, ADAPTER):
        if required not in manifest.files:
            yield f"{required} is not listed"
    used = _graph_files(manifest)
    if manifest.tokenizer:
        used |= {manifest.tokenizer.file, manifest.tokenizer.chat_template} - {""}
    for name in sorted(used - manifest.files.keys()):
        yield f"{name!r} is used but has no digest"


def _graph_files(manifest: Manifest) -> set[str]:
    sections: tuple[Section | Kind, ...] = (manifest.prelude, manifest.head, *manifest.kinds)
    return {graph.file for section in sections for graph in section.graphs.values()}


def _onnx_files(manifest: Manifest) -> set[str]:
    """Every file that onnxruntime may be given, whatever it is called."""
    graphs = _graph_files(manifest) if manifest.backend == "onnx" else set()
    return graphs | {name for name in manifest.files if name.endswith(".onnx")}


def _all_file_problems(folder: Path, manifest: Manifest, *, verify: bool) -> list[str]:
    try:
        return list(_file_problems(folder, manifest, verify=verify))
    except OSError as exc:
        return [f"{exc.filename}: {exc.strerror}"]
    except ValueError as exc:  # a NUL, or half a character, in a name
        return [f"a file name that no file can have: {exc}"]


def _file_problems(folder: Path, manifest: Manifest, *, verify: bool) -> Iterable[str]:
    inside, graphs = folder.resolve(), _onnx_files(manifest)
    for name, expected in manifest.files.items():
        path = folder / name
        if not path.is_file():
            yield f"{name} is missing"
        elif not path.resolve().is_relative_to(inside):
            yield f"{name} is a link that leads outside the folder"
        elif path.stat().st_size != expected.size_bytes:
            yield f"{name}: {path.stat().st_size} bytes, expected {expected.size_bytes} (truncated?)"
        elif verify and sha256_of(path) != expected.sha256:
            yield f"{name}: SHA-256 differs from the manifest (tampered with, or a bad copy)"
        elif name in graphs and (found := [*dict.fromkeys(graph_problems(path))]):
            yield f"{name} {some(found)}"
