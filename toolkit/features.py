"""Inputs of models that read no text: the pixels of images, and the values or the spectra of recordings."""

from typing import Any

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.toolkit.hearing import Tell

PIXELS, SOUND = FEATURES = ("pixel_values", "input_values")
_RATE = 16_000
"""Values a second of the models that there are."""


def feature_of(accepted: Any) -> str:
    """Return which of FEATURES a model takes, by the names that it accepts; empty of one that reads text."""
    return next((name for name in FEATURES if name in accepted), "")


def feature_input(name: str, config: Any, *, length: int | None, tell: Tell) -> Input:
    """Describe one of FEATURES, float32: (batch, channels, height, width), (batch, values), or (batch, frames, bands).

    ``length`` is how many values a recording has; a second of them where nobody says. A spectrogram transformer has its own.
    """
    if name == PIXELS:
        size = config.image_size
        height, width = size if isinstance(size, (list, tuple)) else (size, size)
        return Input(name, "float32", ("batch", config.num_channels, height, width))
    if bands := getattr(config, "num_mel_bins", None):
        tell(
            f"sound: the model takes spectra of {config.max_length} x {bands}, not recordings: bring them as .npz"
        )
        return Input(name, "float32", ("batch", config.max_length, bands))
    if not length:
        tell(
            f"sound: recordings are cut or padded to {_RATE} values, a second of them; --max-length says otherwise"
        )
    return Input(name, "float32", ("batch", length or _RATE))
