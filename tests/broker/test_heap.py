"""Freed memory that a process keeps: pages that are used again are not found anew."""

import os
import subprocess
import sys

import pytest

CODE = """
import resource
from fleetune.broker.heap import keep_freed
print({kept})
def use():
    for size in (120, 300, 600, 1200):
        blocks = [b"x" * (size * 1024) for _ in range(4)]
for _ in range(3): use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): use()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(kept, **environment):
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    command = [sys.executable, "-c", CODE.format(kept=kept)]
    done = subprocess.run(command, env=clean | environment, capture_output=True, text=True, check=True)
    is_kept, faults = done.stdout.split()
    return is_kept, int(faults)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_pages_that_are_used_again_are_not_found_anew():
    is_kept, faults = run("keep_freed()")
    assert is_kept == "True"
    assert faults * 10 < run("None")[1]


def test_what_the_environment_says_of_memory_stands():
    assert run("keep_freed()", MALLOC_ARENA_MAX="2")[0] == "False"


def test_another_c_library_is_left_as_it_is(monkeypatch):
    from fleetune.broker import heap

    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert not heap.keep_freed()
