import math
from typing import Annotated

import msgspec
import pytest

from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.device_runtime.options import Option, check, fields_of, problems, values_of
from fleetune.device_runtime.tables import Table


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    rate: Annotated[float, Option("share", at_least=0, below=1)] = 0.0
    kind: Annotated[str, Option("what", table="fruit", choices=("none",))] = "apple"


class Outer(msgspec.Struct, frozen=True, kw_only=True):
    lr: Annotated[float, Option("rate", above=0)] = 1.0
    role: Annotated[str, Option("what for", choices=("eat", "cook"))] = "eat"
    inner: Inner = Inner()
    free: int = 0


FRUIT = {"fruit": Table("fruit", {"apple": 1, "pear": 2})}


def test_values_go_by_names_down_to_the_last():
    values = values_of(Outer(lr=3.0, inner=Inner(kind="pear")))
    assert values == {"lr": 3.0, "role": "eat", "inner.rate": 0.0, "inner.kind": "pear", "free": 0}


def test_what_keeps_every_law_is_let_be():
    assert problems(Outer(), FRUIT) == []
    check(Inner(kind="none"), Outer(free=-5, inner=Inner(kind="pear")), Outer(lr=3), tables=FRUIT)


@pytest.mark.parametrize(
    ("struct", "said"),
    [
        (Outer(lr=0), "lr must be above 0, got 0"),
        (Outer(lr=math.nan), "lr must be above 0, got nan"),
        (Outer(lr=math.inf), "lr must be above 0, got inf"),
        (Outer(lr="fast"), "lr 'fast': Expected `float`, got `str`"),
        (Outer(free=1.5), "free 1.5: Expected `int`, got `float`"),
        (Outer(role="sleep"), "no role 'sleep'; have: cook, eat"),
        (Outer(inner=Inner(rate=1)), "rate must be at least 0 and below 1, got 1"),
        (Outer(inner=Inner(rate=-0.1)), "rate must be at least 0 and below 1, got -0.1"),
        (Outer(inner=Inner(kind="brick")), "no fruit 'brick'; have: apple, none, pear"),
    ],
)
def test_a_broken_law_is_named(struct, said):
    assert problems(struct, FRUIT) == [said]


def test_all_that_is_wrong_is_said_at_once():
    with pytest.raises(ConfigError, match=r"lr must .*; rate must .*; no role"):
        check(Outer(lr=-1, inner=Inner(rate=2)), Outer(role="x"), tables=FRUIT)
    with pytest.raises(UnknownName):
        check(Outer(inner=Inner(kind="brick")), tables=FRUIT)


def test_a_name_is_looked_up_only_where_its_table_is_given():
    assert problems(Inner(kind="brick")) == []


def test_a_law_is_ours_and_no_decoders():
    """A device declines an offer that it cannot do with a reason; it does not drop it as malformed."""
    assert msgspec.json.decode(b'{"lr": -1.0}', type=Outer).lr == -1.0


def test_a_field_without_an_option_has_an_empty_one():
    assert {field.name: field.option.help for field in fields_of(Outer)} == {
        "lr": "rate",
        "role": "what for",
        "inner": "",
        "free": "",
    }
