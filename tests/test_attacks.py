"""docs/attacks.md names tests that are there."""

import ast
import re

import pytest
from paths import ROOT

PAGE = (ROOT / "docs" / "attacks.md").read_text()
NAMED = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)


def test_every_row_names_a_test():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and "**" not in line][1:]
    assert len(rows) > 30
    assert [row for row in rows if "::test_" not in row] == []


@pytest.mark.parametrize("path", sorted({path for path, _ in NAMED}))
def test_they_are_there(path):
    there = {
        node.name for node in ast.parse((ROOT / path).read_text()).body if isinstance(node, ast.FunctionDef)
    }
    assert {name for other, name in NAMED if other == path} <= there
