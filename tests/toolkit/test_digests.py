"""A parameter's digest is that of its shape and its values in float32, however it lies in memory and in whatever pieces."""

import hashlib

import pytest
import torch
from torch import Tensor, nn

from fleetune.toolkit import origin


@pytest.mark.parametrize(
    "values",
    [
        torch.arange(30.0).reshape(5, 6),
        torch.arange(30.0).reshape(5, 6).t(),
        torch.arange(30.0).reshape(5, 6).to(torch.bfloat16),
        torch.tensor(3.0),
        torch.zeros(0, 4),
    ],
    ids=["matrix", "turned", "half", "number", "empty"],
)
def test_a_digest_is_of_shape_and_values(monkeypatch: pytest.MonkeyPatch, values: Tensor) -> None:
    monkeypatch.setattr(origin, "_AT_ONCE", 7)
    module = nn.ParameterDict({"w": nn.Parameter(values)})
    whole = values.float().contiguous().numpy()
    expected = hashlib.sha256(f"{whole.shape}".encode() + whole.tobytes()).hexdigest()
    assert origin.parameter_digests(module) == {"w": expected}
