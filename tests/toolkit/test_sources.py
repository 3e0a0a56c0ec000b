"""A slip in where a model or an adapter is read from is told before anything heavy is loaded."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, RemoteEntryNotFoundError, RepositoryNotFoundError
from paths import ROOT

from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.sources import CONFIG, check_adapter_source, check_hub, check_source, config_of


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


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Exception | None], None]:
    """Plays the hub, which knows or cannot be asked; the cache is empty."""

    def play(error: Exception | None) -> None:
        def ask(url: str, **_: object) -> None:
            assert url.endswith("/org/name/resolve/main/config.json")
            if error:
                raise error

        monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_: None)
        monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", ask)

    return play


def of_hub(kind: type[Exception]) -> Exception:
    return kind.__new__(kind)


def test_the_hub_is_asked_once(answers: Callable[[Exception | None], None]) -> None:
    for known in (None, of_hub(RemoteEntryNotFoundError), of_hub(GatedRepoError)):
        answers(known)
        check_hub("org/name", CONFIG)
    answers(of_hub(RepositoryNotFoundError))
    with pytest.raises(ExportError, match="org/name: no such folder, and the hub knows no such name"):
        check_hub("org/name", CONFIG)
    answers(OSError("Name or service not known"))
    with pytest.raises(
        ExportError, match=r"org/name: no such folder.*the hub does not answer: Name or service"
    ):
        check_hub("org/name", CONFIG)


def test_the_hub_is_not_asked_for_what_is_here(
    tmp_path: Path, answers: Callable[[Exception | None], None]
) -> None:
    answers(AssertionError("asked"))
    check_hub(str(tmp_path), CONFIG)
    with pytest.raises(ExportError, match="no such folder, and no name that the hub could know"):
        check_hub("my model", CONFIG)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"task": "poetry"}, "no task 'poetry'"),
        ({"backend": "tensorrt"}, "no backend 'tensorrt'"),
        ({"base_dtype": "int8", "backend": "executorch"}, "the executorch runtime does not take it"),
        ({"num_labels": None}, "give --num-labels"),
        ({"model": "./here"}, "no such folder"),
        ({"model": "my model"}, "no such folder"),
    ],
)
def test_a_slip_is_told_before_torch_is_loaded(changes: dict[str, object], said: str, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    given = {
        "model": str(model),
        "task": "sequence-classification",
        "num_labels": 3,
        "out": str(tmp_path / "o"),
    }
    found = subprocess.run(
        [sys.executable, "-c", _SLIP, json.dumps(given | changes)],
        capture_output=True,
        text=True,
        check=True,
        cwd=ROOT,
    ).stdout
    assert said in found
    assert found.endswith("torch: False\n")


_SLIP = """
import json, sys
from fleetune.device_runtime.errors import FleetuneError
from fleetune.toolkit.export import export
try:
    export(**json.loads(sys.argv[1]))
except FleetuneError as exc:
    print(exc)
print("torch:", "torch" in sys.modules)
"""


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
