"""Every row of the table refuses before it works, and knows what it takes."""

from pathlib import Path

import pytest
from plain_models import Classifier, program

from fleetune.device_runtime.errors import ExportError, UnknownName
from fleetune.exporters.backends import BACKENDS
from fleetune.exporters.storages import BASE_DTYPES, STORAGES
from fleetune.exporters.writing import Description, write_artifact

DESCRIPTION = Description("plain", "Classifier", "sequence-classification", tuple("abcde"), {})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_backend_takes_fp32_and_refuses_what_it_does_not_take(backend: str, tmp_path: Path) -> None:
    taken = STORAGES[backend]
    assert "fp32" in taken
    for base_dtype in set(BASE_DTYPES) - set(taken):
        with pytest.raises(ExportError, match=f"{base_dtype}: the {backend} runtime does not take it"):
            write_artifact(
                program(Classifier((1.0,))),
                DESCRIPTION,
                tmp_path / "a",
                backend=backend,
                base_dtype=base_dtype,
            )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_writer_by_itself_refuses_it_too(backend: str, tmp_path: Path) -> None:
    for base_dtype in set(BASE_DTYPES) - set(STORAGES[backend]):
        with pytest.raises(ExportError, match="runtime does not take it"):
            BACKENDS[backend](program(Classifier((1.0,))), DESCRIPTION, tmp_path / "a", base_dtype=base_dtype)


def test_what_is_known_without_torch_is_what_there_is() -> None:
    assert list(STORAGES) == list(BACKENDS)


def test_an_unknown_backend_is_answered_with_the_choices(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="no backend 'tensorrt'; have: executorch, onnx, ort-training"):
        write_artifact(program(Classifier((1.0,))), DESCRIPTION, tmp_path / "a", backend="tensorrt")
