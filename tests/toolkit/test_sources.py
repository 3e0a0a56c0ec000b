"""A slip in where a model or an adapter is read from is told before anything heavy is loaded."""

from pathlib import Path

import pytest

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.sources import check_adapter_source, check_source, config_of


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ExportError, match="an adapter; give its base as MODEL, and --adapter"):
        check_source(str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ExportError, match="a model and an adapter in one folder"):
        check_source(str(tmp_path))


@pytest.mark.parametrize(("content", "said"), [("{", "cannot be read"), ("[]", "expected a JSON object")])
def test_a_config_that_is_none(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ExportError, match=said):
        config_of(str(tmp_path))


@pytest.mark.parametrize("source", ["/no/such", "./adapter", "a/b/c"])
def test_an_adapter_that_is_not_there(source: str) -> None:
    with pytest.raises(ExportError, match="no such folder; an adapter is a local folder or a hub id"):
        check_adapter_source(source)


def test_what_may_be_on_the_hub_is_left_to_it() -> None:
    check_source("org/name")
    check_adapter_source("org/name")
    assert config_of("org/name") == {}


def test_an_adapter_that_is_not_whole(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text("{")
    with pytest.raises(ExportError, match=r"adapter_config\.json: no JSON object; save the adapter again"):
        check_adapter_source(str(tmp_path))
    config.write_text("{}")
    with pytest.raises(
        ExportError, match=r"without weights \(no adapter_model\.safetensors\); save it again"
    ):
        check_adapter_source(str(tmp_path))
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    check_adapter_source(str(tmp_path))
