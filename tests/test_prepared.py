"""No two threads may have msgspec look at a type for the first time at once: that ends the interpreter."""

import ast
import subprocess
import sys

import pytest
from paths import ROOT

PACKAGES = ("fleetune", "toolkit", "exporters", "device_runtime", "broker")
_THREADS = """
import sys, threading
import msgspec
from fleetune.device_runtime.prepared import prepared

sys.setswitchinterval(1e-6)

def chain(length):
    kind = msgspec.defstruct("First", [("x", int, 0), ("y", dict[str, int] | None, None)])
    for number in range(length):
        kind = msgspec.defstruct(f"Next{number}", [("x", list[kind], []), ("y", dict[str, int] | None, None)])
    return kind

def read(kind, barrier, found):
    barrier.wait()
    found.append(msgspec.json.decode(b'{"x": [{"x": []}], "y": {"a": 1}}', type=prepared(kind)))

for _ in range(60):
    kind, barrier, found = chain(12), threading.Barrier(4), []
    threads = [threading.Thread(target=read, args=(kind, barrier, found)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    assert len(found) == 4 and found[0].y == {"a": 1}
"""


def test_four_threads_read_a_type_for_the_first_time():
    done = subprocess.run(
        [sys.executable, "-c", _THREADS], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-500:]


def types_read(source):
    """Yield line and expression of each type that msgspec is to read into."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("msgspec."):
            continue
        named = {keyword.arg: keyword.value for keyword in node.keywords}
        place = {"decode": 1, "convert": 1, "Decoder": 0}.get(ast.unparse(node.func).rpartition(".")[2])
        if place is not None and (given := named.get("type") or next(iter(node.args[place:]), None)):
            yield node.lineno, given


def is_prepared(given):
    return isinstance(given, ast.Call) and ast.unparse(given.func) == "prepared"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_type_that_is_read_into_is_prepared(package):
    files = [path for path in (ROOT / package).rglob("*.py") if path.name != "prepared.py"]
    bare = [
        f"{path.relative_to(ROOT)}:{line}: {ast.unparse(given)}"
        for path in files
        for line, given in types_read(path.read_text())
        if not is_prepared(given)
    ]
    assert bare == []


def test_a_type_that_is_not_prepared_is_found():
    source = "msgspec.json.decode(a, type=K)\nmsgspec.convert(a, K)\nmsgspec.msgpack.Decoder(K)\nmsgspec.json.decode(a)\n"
    assert [line for line, given in types_read(source) if not is_prepared(given)] == [1, 2, 3]
