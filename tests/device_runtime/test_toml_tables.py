"""TOML tables against structs: paths, choices, mappings to structs, and fields that a file may not give."""

from typing import Annotated, Literal

import msgspec
import pytest

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import Option
from fleetune.device_runtime.tables import Table
from fleetune.device_runtime.toml_tables import mistakes, read_table


class Wheel(msgspec.Struct, frozen=True):
    size: Annotated[float, Option(above=0)]
    kind: Annotated[str, Option(table="wheel")] = "round"


class Cart(msgspec.Struct, frozen=True):
    name: str
    wheels: dict[str, Wheel] = {}
    spare: Wheel | None = None
    made: Literal["here", "there"] = "here"
    parts: tuple[str, ...] = ()
    loads: dict[str, float] = {}
    has_roof: bool = False
    number: int | None = None


TABLES = {"wheel": Table("wheel", {"round": 1, "square": 2})}


def told(table, **more):
    return list(mistakes(Cart, table, "", tables=TABLES, **more))


def test_what_is_right_has_no_mistakes():
    full = {
        "name": "a",
        "wheels": {"left": {"size": 2, "kind": "square"}},
        "spare": {"size": 1},
        "loads": {"x": 1},
    }
    assert told(full) == []


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({}, "needs name"),
        ({"name": "a", "weels": 1}, "unknown key 'weels'; have: has_roof, loads, made, name, "),
        ({"name": "a", "wheels": {"left": {}}}, "wheels.left: needs size"),
        ({"name": "a", "wheels": {"left": {"size": 1, "sise": 2}}}, "wheels.left: unknown key 'sise'; have: kind, size"),
        ({"name": "a", "wheels": {"left": {"size": 0}}}, "wheels.left.size: size must be above 0, got 0"),
        ({"name": "a", "wheels": {"left": {"size": float("inf")}}}, "wheels.left.size: size must be above 0, got inf"),
        ({"name": "a", "wheels": {"left": {"size": 1, "kind": "flat"}}}, "wheels.left.kind: no wheel 'flat'; have: round"),
        ({"name": "a", "wheels": 3}, "wheels = 3: expected a table"),
        ({"name": "a", "wheels": {"left": 3}}, "wheels.left = 3: expected a table of kind, size"),
        ({"name": "a", "spare": 3}, "spare = 3: expected a table of kind, size"),
        ({"name": 3}, "name = 3: expected a text"),
        ({"name": "a", "made": "far"}, "made = 'far': expected here, there"),
        ({"name": "a", "parts": "x"}, "parts = 'x': expected a list: a text"),
        ({"name": "a", "loads": {"x": "y"}}, "loads = {'x': 'y'}: expected a table"),
        ({"name": "a", "has_roof": 1}, "has_roof = 1: expected true or false"),
        ({"name": "a", "number": "x"}, "number = 'x': expected a whole number or nothing"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_by_its_whole_path(table, said):
    (only,) = told(table)
    assert only.startswith(said)


def test_what_a_file_may_not_give_is_unknown_there_and_needed_nowhere():
    assert told({}, without={"": ("name",)}) == []
    (only,) = told({"name": "a", "spare": {"size": 1}}, without={"spare": ("size",)})
    assert only == "spare: unknown key 'size'; have: kind"


@pytest.mark.parametrize("content", [b"a =", b"\xff\xfe", b"a = " + b"[" * 100_000])
def test_what_is_no_toml_is_refused_with_the_file(tmp_path, content):
    (tmp_path / "a.toml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"a\.toml: cannot be read as TOML"):
        read_table(tmp_path / "a.toml")
