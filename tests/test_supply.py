"""What a device installs, and what no product code does."""

import ast
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from paths import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOCK = (ROOT / "requirements-device.txt").read_text("utf-8")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
LOCKED_EXTRAS = ("device", "trust")
ENTRIES = re.split(r"\n(?=\S)", LOCK.strip())

UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_METHODS = {("yaml", "load"), ("yaml", "unsafe_load"), ("torch", "load"), ("numpy", "load")}
SOURCES = [
    path
    for package in ("toolkit", "exporters", "device_runtime", "broker")
    for path in sorted((ROOT / package).rglob("*.py"))
]


def locked() -> list[Requirement]:
    return [Requirement(entry.partition("\\")[0].strip()) for entry in ENTRIES]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.13"])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_lock_has_what_a_device_needs_and_as_it_needs_it(python, machine):
    there = {
        "python_version": python,
        "python_full_version": f"{python}.1",
        "platform_machine": machine,
        "sys_platform": "linux",
    }
    pinned: dict[str, str] = {}
    for entry in locked():
        if entry.marker is None or entry.marker.evaluate(there):
            assert canonicalize_name(entry.name) not in pinned, f"{entry.name}: twice for one machine"
            pinned[canonicalize_name(entry.name)] = next(iter(entry.specifier)).version
    needed = [
        *PROJECT["dependencies"],
        *(n for e in LOCKED_EXTRAS for n in PROJECT["optional-dependencies"][e]),
    ]
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate(there):
            assert pinned[canonicalize_name(requirement.name)] in requirement.specifier, requirement


def test_each_line_of_the_lock_is_one_version_with_its_digests():
    for entry, requirement in zip(ENTRIES, locked(), strict=True):
        assert [spec.operator for spec in requirement.specifier] == ["=="], entry
        assert re.findall(r"--hash=sha256:[0-9a-f]{64}", entry), entry
    assert not re.search(r"^--|https?://", LOCK, re.M), "an index, or where a file lies"


def test_nothing_here_runs_what_it_reads():
    """No pickle in any form, and no code from text."""
    found = {
        str(path.relative_to(ROOT)): list(unsafe(ast.parse(path.read_text("utf-8")))) for path in SOURCES
    }
    assert len(found) > 300
    assert not {path: what for path, what in found.items() if what}


def unsafe(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
            yield from (name for name in names if name.partition(".")[0] in UNSAFE_MODULES)
        if isinstance(node, ast.Call):
            yield from unsafe_call(node)


def unsafe_call(call: ast.Call):
    if isinstance(call.func, ast.Name) and call.func.id in UNSAFE_CALLS:
        yield f"{call.func.id}: line {call.lineno}"
    if isinstance(call.func, ast.Attribute) and isinstance(call.func.value, ast.Name):
        owner = {"np": "numpy"}.get(call.func.value.id, call.func.value.id)
        if (owner, call.func.attr) in UNSAFE_METHODS:
            yield f"{owner}.{call.func.attr}: line {call.lineno}"
    for keyword in call.keywords:
        if keyword.arg == "allow_pickle" and not (
            isinstance(keyword.value, ast.Constant) and keyword.value.value is False
        ):
            yield f"allow_pickle: line {call.lineno}"


@pytest.mark.parametrize(
    "text",
    [
        "import pickle", "from dill import loads", "import torch.load, cloudpickle", "eval('1')", "exec(text)",
        "np.load(file)", "torch.load(path, weights_only=False)", "read_array(file, allow_pickle=True)", "yaml.load(t)",
    ],
)  # fmt: skip
def test_the_search_finds(text):
    assert list(unsafe(ast.parse(text)))
