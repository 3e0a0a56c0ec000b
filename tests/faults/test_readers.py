"""Every reader refuses what is damaged in one line of our errors: within a second of processor time and 200 MB.

A mutation has a number, and is the same every time. FLEETUNE_MUTATIONS is how many the long form tries of each reader; alone:
``python tests/support/fuzz.py READER COUNT FIRST``.
"""

import gzip
import json
import os
import subprocess
import sys
from unittest.mock import patch

import children
import fuzz
import pytest
from paths import ROOT
from readers import READERS

from fleetune.device_runtime.errors import DataError

COUNT = int(os.environ.get("FLEETUNE_MUTATIONS", "100000"))
FEW = 150
NEVER_REFUSED = ("service", "agent", "codec memory", "old residual", "hidden cache", "left.jsonl")
"""What is damaged there is dropped, set aside or passed over."""


@pytest.mark.parametrize("name", READERS)
def test_a_few_damaged_contents_are_refused_in_our_words(tmp_path, name):
    with READERS[name](tmp_path) as reader:
        found = fuzz.fuzz(reader, FEW)
    assert found.escapes == {}, found.seeds
    assert found.large == 0, found.seed_of_largest
    assert (found.refused == 0) == (name in NEVER_REFUSED)


@pytest.mark.faults
@pytest.mark.parametrize("name", READERS)
def test_many_damaged_contents_are_refused_in_time(tmp_path, name):
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests' / 'support'}",
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, fuzz.__file__, name, str(COUNT), "1000000"]
    output, _ = children.start(command, stdout=subprocess.PIPE, env=environment).communicate()
    found = json.loads(output)
    print(name, found)
    assert (found["tried"], found["escapes"]) == (COUNT, {}), found["seeds"]
    assert (found["slow"], found["large"]) == (0, 0), (found["seed_of_slowest"], found["seed_of_largest"])


@pytest.mark.parametrize("bomb", fuzz.BOMBS, ids=lambda of: f"{of[0][:8]!r} x {of[1]}")
def test_a_small_gz_does_not_take_the_memory(tmp_path, bomb):
    with READERS["jsonl.gz"](tmp_path) as reader:
        found = fuzz.fuzz(reader._replace(mutate=lambda *_: fuzz.bomb(bomb)), 1)
    assert (found.refused, found.escapes, found.large) == (1, {}, 0)


@pytest.mark.parametrize("blank", [b"\n", b",\n", b"\r", b" \r\n"], ids=repr)
def test_blank_lines_without_end_are_not_all_looked_at(tmp_path, blank):
    content = gzip.compress(b"text,label\n" + blank * (2 * 1024**2 // len(blank) - 20) + b"red,a\n")
    with (
        READERS["csv.gz"](tmp_path) as reader,
        pytest.raises(DataError, match=r"line 1\d\d,?\d{3}: .* blank lines"),
    ):
        reader.read(content)


def test_as_many_blank_lines_as_others_are_no_matter(tmp_path):
    with READERS["csv.gz"](tmp_path) as reader, patch("fleetune.device_runtime.data.lines.BLANK_MAX", 10):
        reader.read(gzip.compress(b"text,label\n" + b"red,a\n\n" * 30))


def test_the_harness_finds_what_escapes_and_what_takes_memory(tmp_path):
    def read(content):
        if content == b"bad":
            raise KeyError("x")
        return bytearray(b"x" * 250_000_000) if content == b"large" else None

    def mutate(content, rng):
        return (b"bad", b"large", b"good")[rng.randrange(3)]

    found = fuzz.fuzz(fuzz.Reader([b"good"], mutate, read), 6)
    assert sum(found.escapes.values()) > 0
    assert next(iter(found.escapes)).startswith("KeyError at")
    assert found.large > 0
    assert found.most_mb > 200
