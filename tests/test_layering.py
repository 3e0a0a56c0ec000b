"""Who may load what, asked of a cold interpreter."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

PACKAGES = ("toolkit", "exporters", "device_runtime", "broker")
FRAMEWORKS = ("torch", "transformers", "peft", "onnx", "onnxscript")
RUNTIMES = (*FRAMEWORKS, "onnxruntime")
COMMANDS = (
    "export", "inspect", "selfcheck", "sign", "train", "predict", "device", "aggregate", "broker", "merge", "demo", "bench",
    "generate", "simulate", "compare", "enrol", "plot", "status", "watch", "doctor", "init", "web",
)  # fmt: skip

AUTHORITY = ("init", "server", "aggregator", "sign", "list", "revoke")


def cold(code: str) -> set[str]:
    """Top-level names of all that a new interpreter has loaded after running ``code``."""
    ask = f"import json, sys\n{code}\nprint(json.dumps(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def modules_of(package: str) -> list[str]:
    """Every module of a package, its rooms included."""
    files = sorted(path.relative_to(ROOT).with_suffix("") for path in (ROOT / package).rglob("*.py"))
    return [".".join(["fleetune", *file.parts]).removesuffix(".__init__") for file in files]


def imports_of(package: str) -> str:
    return "\n".join(f"import {module}" for module in modules_of(package))


@pytest.mark.parametrize(
    "package",
    ["fleetune", "fleetune.device_runtime", "fleetune.broker", "fleetune.toolkit", "fleetune.toolkit.cli"],
)
def test_a_package_alone_is_light(package):
    assert not cold(f"import {package}") & set(RUNTIMES)


def test_what_is_asked_before_torch_is_loaded_loads_none():
    modules = (
        "toolkit.export",
        "toolkit.merge",
        "toolkit.labels",
        "toolkit.sources",
        "toolkit.origin",
        "exporters.storages",
    )
    assert not cold("\n".join(f"import fleetune.{module}" for module in modules)) & set(FRAMEWORKS)


def test_no_module_of_the_device_runtime_loads_a_framework():
    assert not cold(imports_of("device_runtime")) & set(FRAMEWORKS)


def test_no_module_of_the_broker_loads_a_framework_or_an_engine():
    assert not cold(imports_of("broker")) & {*RUNTIMES, "dp_accounting", "scipy"}


def test_help_of_every_command_is_light():
    lines = ["from fleetune.toolkit.cli import app"]
    for command in [*COMMANDS, "authority", *(f"authority {word}" for word in AUTHORITY)]:
        lines += [
            "try:",
            f"    app([*{command.split()!r}, '--help'])",
            "except SystemExit as done:",
            "    assert not done.code",
        ]
    assert not cold("\n".join(lines)) & {*RUNTIMES, "paho", "amqtt", "tokenizers", "cryptography"}


def test_the_command_list_here_is_the_real_one():
    from fleetune.toolkit.cli import COMMANDS as registered

    assert {function.__name__ for function in registered} == set(COMMANDS)


def lint(root: Path) -> "subprocess.CompletedProcess[str]":
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {**os.environ, "PYTHONPATH": str(root), "COLUMNS": "500"}
    return subprocess.run(command, capture_output=True, text=True, cwd=root, env=environment, check=False)


def test_import_contracts_hold():
    said = lint(ROOT)
    assert said.returncode == 0, said.stdout + said.stderr


BAD_IMPORTS = {
    "device_runtime/methods/policies.py": "from fleetune.device_runtime.network.link import Link",
    "device_runtime/engine/chain.py": "from fleetune.device_runtime.training.trainer import Trainer",
    "device_runtime/agent/agent.py": "from fleetune.device_runtime.engine.stack import Stack",
    "device_runtime/rules/rules.py": "from fleetune.device_runtime.contracts.wire import Hello",
    "broker/service/service.py": "from fleetune.device_runtime.agent.agent import Agent",
    "broker/rounds/federation.py": "from fleetune.device_runtime.training.budget import fit",
    "exporters/writing.py": "from fleetune.device_runtime.engine.lanes import Lanes",
    "broker/service/versions.py": "import safetensors",
    "device_runtime/network/client.py": "import ssl",
    "device_runtime/data/labels.py": "import csv",
}
"""Each would run, and each goes through a wall."""


def test_an_import_through_a_wall_is_refused_by_name(tmp_path):
    for package in PACKAGES:
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "fleetune", tmp_path / "fleetune", symlinks=True)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    for file, line in BAD_IMPORTS.items():
        path = tmp_path / file
        path.write_text(f"{path.read_text()}\n{line}\n")
    said = lint(tmp_path)
    assert said.returncode == 1
    for file, line in BAD_IMPORTS.items():
        importer, imported = f"fleetune/{file}".removesuffix(".py").replace("/", "."), line.split()[1]
        assert f"{importer} -> {imported}" in said.stdout, said.stdout
