"""In which dtypes a checkpoint keeps its tensors, and how a model in float32 gets them back."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import safe_open

from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.model.mapped import one_by_one
from fleetune.exporters.model.quantize import is_finite

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def cast_as_stored(model: Any, source: str, config: Any) -> None:
    """Round the floats of ``model``, in place, to what the checkpoint at ``source`` has: tensor by tensor where it says.

    Raises:
        ExportError: a value is too large for its dtype.
    """
    stored = dict(_stored(source))
    usual = config.dtype or next(iter(stored.values()), torch.float32)
    prefix = f"{model.base_model_prefix}."
    saved = model.state_dict().keys()
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, values in one_by_one((name, tensor.data) for name, tensor in tensors.items()):
        if name not in saved or not values.is_floating_point():
            continue
        dtype = stored.get(name) or stored.get(name.removeprefix(prefix)) or usual
        tensors[name].data = values.to(dtype)
        if not is_finite(tensors[name]):
            raise ExportError(f"{name}: merged, it holds values beyond {dtype}, the dtype of {source}")
    model.config.dtype = usual


def _stored(source: str) -> Iterable[tuple[str, torch.dtype]]:
    """Dtypes by name in the safetensors files of a folder or of a model in the hub's cache; none of other files."""
    config = transformers.utils.cached_file(source, "config.json", local_files_only=True)
    for path in sorted(Path(config).parent.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                dtype = _DTYPES.get(file.get_slice(name).get_dtype())
                if dtype:
                    yield name, dtype
