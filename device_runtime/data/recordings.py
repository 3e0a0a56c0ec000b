"""Recordings as a feature extractor of transformers makes them; only this imports soundfile."""

import wave
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError, lacking, one_line
from fleetune.device_runtime.files import read_json

VALUES_MAX = 50_000_000
"""Of one recording, over all channels: at 16 kHz nearly an hour."""
_EPSILON = 1e-7
_WIDTHS = {1: "u1", 2: "<i2", 4: "<i4"}


class FeatureExtractor(msgspec.Struct, frozen=True):
    """What of a feature extractor's configuration is followed."""

    sampling_rate: int
    """Values a second."""
    do_normalize: bool = False
    """To mean 0 and variance 1, over what is not padding."""
    padding_value: float = 0.0


def recording_reader(config: Path, shape: tuple[int, ...]) -> Callable[[Path], tuple[Floats, int]]:
    """Make what reads a recording as float32 ``shape``, (values,): the mean of its channels, padded or cut at its end.

    WAV files of whole numbers are read without a library, all others by soundfile.

    Raises:
        ArtifactError: a configuration that is no feature extractor's.
    (what is made)
        DataError: no recording, a damaged one, or one of another sampling rate; names the file.
        ConfigError: soundfile is needed and not installed.
    """
    wanted = read_json(config, FeatureExtractor)
    if wanted is None or wanted.sampling_rate < 1:
        raise ArtifactError(f"{config}: says no sampling_rate")
    (length,) = shape

    def read(path: Path) -> tuple[Floats, int]:
        values, rate = _read(path)
        if rate != wanted.sampling_rate:
            raise DataError(
                f"{path}: {rate} values a second, the model takes {wanted.sampling_rate}; "
                f"resample it, as `ffmpeg -i IN -ar {wanted.sampling_rate} OUT` does"
            )
        lost = max(0, len(values) - length)
        heard = _normalised(values[:length]) if wanted.do_normalize else values[:length]
        out: Floats = np.full(length, wanted.padding_value, np.float32)
        out[: len(heard)] = heard
        return out, lost

    return read


def _read(path: Path) -> tuple[Floats, int]:
    """Values (frames,), the mean of all channels, and how many are a second."""
    try:
        found = _wav(path) if path.suffix.lower() == ".wav" else None
        values, rate = _by_library(path) if found is None else found
    except (DataError, ConfigError):
        raise
    except Exception as exc:  # wave, numpy and soundfile raise a dozen types for a damaged file
        said = getattr(exc, "strerror", None) or str(exc).replace(str(path), "it") or type(exc).__name__
        raise DataError(f"{path}: not a whole recording: {one_line(said)}; replace or remove it") from exc
    if not len(values) or not np.isfinite(values).all():
        raise DataError(f"{path}: no sound in it, or values that are not finite; replace or remove it")
    mean: Floats = values.mean(1, dtype=np.float32)
    return mean, rate


def _wav(path: Path) -> tuple[Floats, int] | None:
    """A WAV file of 8, 16 or 32 bits; None for one of another kind."""
    try:
        with wave.open(str(path)) as file:
            said = file.getparams()
            if said.sampwidth not in _WIDTHS:
                return None
            _check_size(path, said.nframes * said.nchannels)
            content = file.readframes(said.nframes)
    except wave.Error as exc:
        if "unknown format" in str(exc):
            return None
        raise
    if len(content) != said.nframes * said.nchannels * said.sampwidth:
        raise DataError(f"{path}: cut short; replace or remove it")
    whole = np.frombuffer(content, _WIDTHS[said.sampwidth]).reshape(-1, said.nchannels)
    middle = 128 if said.sampwidth == 1 else 0
    values: Floats = ((whole.astype(np.float64) - middle) / 2.0 ** (8 * said.sampwidth - 1)).astype(
        np.float32
    )
    return values, said.framerate


def _by_library(path: Path) -> tuple[Floats, int]:
    try:
        import soundfile
    except (ImportError, OSError) as exc:
        raise lacking(f"{path}", "soundfile", "audio") from exc
    with soundfile.SoundFile(path) as file:
        _check_size(path, file.frames * file.channels)
        values: Floats = file.read(dtype="float32", always_2d=True)
        if len(values) != file.frames:
            raise DataError(f"{path}: cut short; replace or remove it")
        return values, int(file.samplerate)


def _check_size(path: Path, num_values: int) -> None:
    if num_values > VALUES_MAX:
        raise DataError(f"{path}: {num_values:,} values, more than {VALUES_MAX:,}; cut it into shorter ones")


def _normalised(values: Floats) -> Floats:
    normal: Floats = (values - values.mean()) / np.sqrt(values.var() + _EPSILON)
    return normal
