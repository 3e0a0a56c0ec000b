"""Who may load what, asked of a cold interpreter."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FRAMEWORKS = ("torch", "transformers", "peft", "onnx", "onnxscript")
RUNTIMES = (*FRAMEWORKS, "onnxruntime")
COMMANDS = (
    "export", "inspect", "selfcheck", "train", "predict", "device", "aggregate", "broker", "merge", "demo", "bench",
)  # fmt: skip


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


def test_no_module_of_the_device_runtime_loads_a_framework():
    assert not cold(imports_of("device_runtime")) & set(FRAMEWORKS)


def test_no_module_of_the_broker_loads_a_framework_or_an_engine():
    assert not cold(imports_of("broker")) & set(RUNTIMES)


def test_help_of_every_command_is_light():
    lines = ["from fleetune.toolkit.cli import app"]
    for command in COMMANDS:
        lines += [
            "try:",
            f"    app([{command!r}, '--help'])",
            "except SystemExit as done:",
            "    assert not done.code",
        ]
    assert not cold("\n".join(lines)) & {*RUNTIMES, "paho", "amqtt", "tokenizers"}


def test_the_command_list_here_is_the_real_one():
    from fleetune.toolkit.cli import COMMANDS as registered

    assert {function.__name__ for function in registered} == set(COMMANDS)


def test_import_contracts_hold():
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([str(tool), "--no-cache"], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
