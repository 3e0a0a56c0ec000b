"""Images as an image processor of transformers makes them; only this imports Pillow."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from fleetune.device_runtime.arrays import Floats
from fleetune.device_runtime.errors import ArtifactError, DataError, lacking, one_line
from fleetune.device_runtime.files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image

PIXELS_MAX = 50_000_000
"""Of one image: a few bytes may say that they are more than the memory."""
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_MODES = {1: "L", 3: "RGB"}
_SHAPE = ("height", "width")
_EDGE = "shortest_edge"


class ImageProcessor(msgspec.Struct, frozen=True):
    """What of an image processor's configuration is followed; what else it may ask is refused."""

    do_resize: bool | None = True
    size: int | dict[str, int] | None = None
    resample: int = 2
    do_center_crop: bool | None = False
    crop_size: int | dict[str, int] | None = None
    do_rescale: bool | None = True
    rescale_factor: float = 1 / 255
    do_normalize: bool | None = None
    image_mean: list[float] | float | None = None
    image_std: list[float] | float | None = None
    crop_pct: float | None = None
    do_pad: bool | None = False
    do_flip_channel_order: bool | None = False
    do_color_quantize: bool | None = False


def image_reader(config: Path, shape: tuple[int, ...]) -> Callable[[Path], tuple[Floats, int]]:
    """Make what reads an image file as float32 ``shape``, (channels, height, width), to the bit as transformers with Pillow.

    Raises:
        ArtifactError: a configuration that is no image processor's, or does not go with the model.
        ConfigError: Pillow is not installed.
    (what is made)
        DataError: no image, a damaged one, or one of more than PIXELS_MAX; names the file.
    """
    wanted = read_json(config, ImageProcessor)
    if wanted is None:
        raise ArtifactError(f"{config}: cannot be read")
    _check(config, wanted, shape)
    try:
        import PIL.Image  # noqa: F401
    except ImportError as exc:
        raise lacking("an image", "Pillow", "images") from exc

    def read(path: Path) -> tuple[Floats, int]:
        image = _cropped(_resized(_opened(path, _MODES[shape[0]]), wanted), wanted)
        pixels = np.asarray(image)
        pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
        if pixels.shape != shape:
            raise ArtifactError(
                f"{config}: makes {list(pixels.shape)} of {path.name}, the model takes {list(shape)}"
            )
        return _normalised(pixels.astype(np.float64), wanted), 0

    return read


def _check(config: Path, wanted: ImageProcessor, shape: tuple[int, ...]) -> None:
    strange = ("crop_pct", "do_pad", "do_flip_channel_order", "do_color_quantize")
    problems = [
        f"{name} is not followed here: bring an .npz file" for name in strange if getattr(wanted, name)
    ]
    if shape[0] not in _MODES:
        problems.append(f"a model of {shape[0]} channels: bring an .npz file")
    if wanted.do_normalize and (wanted.image_mean is None or wanted.image_std is None):
        problems.append("no image_mean or image_std")
    for name in ("image_mean", "image_std"):
        value = getattr(wanted, name)
        if isinstance(value, list) and len(value) != shape[0]:
            problems.append(f"{name} has {len(value)} values, the model {shape[0]} channels")
    if not np.all(np.asarray(1.0 if wanted.image_std is None else wanted.image_std)):
        problems.append("image_std 0")
    if not all(0 < n <= 10_000 for size in (wanted.size, wanted.crop_size) for n in _numbers(size)):
        problems.append("size and crop_size: expected 1 to 10000")
    if not 0 <= wanted.resample <= 5:
        problems.append(f"resample {wanted.resample}: expected 0 to 5, as Pillow counts")
    if problems:
        raise ArtifactError(f"{config}: " + "; ".join(problems))


def _numbers(size: int | dict[str, int] | None) -> list[int]:
    return [] if size is None else [size] if isinstance(size, int) else [*size.values()]


def _opened(path: Path, mode: str) -> "Image":
    """The image upright and in ``mode``."""
    from PIL import Image, ImageOps

    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > PIXELS_MAX:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels, more than {PIXELS_MAX:,}; make it smaller"
                )
            return ImageOps.exif_transpose(image).convert(mode)
    except DataError:
        raise
    except Exception as exc:  # Pillow raises a dozen types for a damaged file
        said = getattr(exc, "strerror", None) or str(exc).replace(str(path), "it") or type(exc).__name__
        raise DataError(f"{path}: not a whole image: {one_line(said)}; replace or remove it") from exc


def _resized(image: "Image", wanted: ImageProcessor) -> "Image":
    if not wanted.do_resize or wanted.size is None:
        return image
    from PIL.Image import Resampling

    return image.resize(_target(image, wanted), resample=Resampling(wanted.resample))


def _target(image: "Image", wanted: ImageProcessor) -> tuple[int, int]:
    """Width and height; a number alone is the shorter edge where a crop follows, and both edges where none does."""
    size = wanted.size
    if isinstance(size, int):
        size = {_EDGE: size} if wanted.do_center_crop else dict.fromkeys(_SHAPE, size)
    if size and _EDGE in size:
        short, long = sorted((image.width, image.height))
        edge, other = size[_EDGE], int(size[_EDGE] * long / short)
        return (edge, other) if image.width <= image.height else (other, edge)
    if not size or not set(_SHAPE) <= size.keys():
        raise ArtifactError(f"size {size}: expected height and width, or {_EDGE}")
    return size["width"], size["height"]


def _cropped(image: "Image", wanted: ImageProcessor) -> "Image":
    """The middle of it; beyond its edges it is black."""
    if not wanted.do_center_crop or wanted.crop_size is None:
        return image
    crop = wanted.crop_size
    width, height = (crop, crop) if isinstance(crop, int) else (crop.get("width", 0), crop.get("height", 0))
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _normalised(pixels: np.ndarray, wanted: ImageProcessor) -> Floats:
    """Rescaled in float64 and then normalised in float32, as transformers does."""
    values: Floats = (pixels * wanted.rescale_factor if wanted.do_rescale else pixels).astype(np.float32)
    has_mean = wanted.image_mean is not None and wanted.image_std is not None
    if not (has_mean if wanted.do_normalize is None else wanted.do_normalize):
        return values
    mean, std = (
        np.broadcast_to(np.asarray(value, np.float32), len(values))[:, None, None]
        for value in (wanted.image_mean, wanted.image_std)
    )
    return (values - mean) / std
