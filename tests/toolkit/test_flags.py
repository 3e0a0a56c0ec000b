from typing import Annotated

import msgspec
import pytest
from typer import Typer
from typer.testing import CliRunner

from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import UnknownName
from fleetune.device_runtime.options import Option
from fleetune.toolkit.commands.options import AGGREGATE, with_flags
from fleetune.toolkit.flags import Part, claimed, flags_of, structs_of


class Inner(msgspec.Struct, frozen=True, kw_only=True):
    name: Annotated[str, Option("which", choices=("here", "there"))] = "here"
    shape: str = "round"


class Toy(msgspec.Struct, frozen=True, kw_only=True):
    count: Annotated[int, Option("how many", at_least=1)]
    place: Inner = Inner()
    proximal: float = 0.0
    loud: Annotated[bool, Option("be loud, or not", off="quiet")] = False


class Other(msgspec.Struct, frozen=True, kw_only=True):
    count: int = 0


TOY = {"toy": Part(Toy, names={"place.shape": "place_shape"})}


def test_every_field_is_a_flag_and_a_nested_name_is_called_as_its_struct_is():
    assert [flag.name for flag in flags_of(TOY["toy"])] == [
        "count",
        "place",
        "place_shape",
        "proximal",
        "loud",
    ]


def test_flags_make_structs_and_what_is_not_given_keeps_its_default():
    made = structs_of({"count": 2, "place": "there", "proximal": 0.5}, TOY)
    assert made == {"toy": Toy(count=2, place=Inner(name="there"), proximal=0.5)}


def test_a_struct_in_the_place_of_its_type_gives_the_defaults():
    work = LocalWork(batch_size=4, policy=PolicySpec(name="suffix", drop=0.5))
    assert structs_of({}, {"work": Part(work)}) == {"work": work}
    changed = structs_of({"drop": 0.25, "lr": 1.0}, {"work": Part(work)})["work"]
    assert changed.policy == PolicySpec(name="suffix", drop=0.25)
    assert (changed.batch_size, changed.optimizer) == (4, OptimizerSpec(lr=1.0))


def test_a_flag_that_no_struct_claims_is_refused():
    with pytest.raises(UnknownName, match=r"no option 'batchsize'; have: .*batch_size"):
        structs_of({"batchsize": 99}, AGGREGATE)
    with pytest.raises(UnknownName, match="no option 'proximal'"):
        structs_of({"proximal": 1.0}, {"toy": Part(Toy, without=("proximal",))})


def test_two_fields_do_not_claim_one_flag():
    with pytest.raises(ValueError, match=r"flag 'count' is claimed by toy\.count and by other\.count"):
        claimed({**TOY, "other": Part(Other())})
    assert claimed({**TOY, "other": Part(Other(), names={"count": "others"})})["others"][0] == "other"


@pytest.mark.parametrize("part", [Part(Toy, names={"plaice": "x"}), Part(Toy, without=("place.size",))])
def test_a_part_names_no_field_that_is_not_there(part):
    with pytest.raises(ValueError, match="Toy has no field pla"):
        flags_of(part)


def run(*words):
    app, seen = Typer(rich_markup_mode=None), []

    @app.command()
    @with_flags(TOY)
    def toy(*, json: bool = False, **flags):
        seen.append({name: value for name, value in flags.items() if value is not None})

    return CliRunner().invoke(app, words), seen


def test_a_field_appears_by_itself_on_the_command_line():
    """Its diff is the field: no list of options is edited."""
    done, seen = run("--count", "3", "--proximal", "0.1", "--place-shape", "oval", "--quiet")
    assert done.exit_code == 0, done.output
    assert seen == [{"count": 3, "proximal": 0.1, "place_shape": "oval", "loud": False}]
    assert run("--proximal", "much")[0].exit_code == 2
    assert run("--distal", "1")[0].exit_code == 2


def test_help_shows_law_less_fields_defaults_and_choices():
    shown = " ".join(run("--help")[0].output.split())
    assert "--place NAME which: here or there [default: here]" in shown
    assert "--proximal <float> [default: 0.0]" in shown
    assert "--loud / --quiet be loud, or not" in shown
    assert "how many [default" not in shown, "it must be given"
    assert shown.index("--proximal") < shown.index("--json")
