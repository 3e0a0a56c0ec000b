"""Graphs of any backend become an artifact: here converters that write no graph worth the name, in a moment."""

from pathlib import Path

import numpy as np
import pytest
import torch
from plain_models import Classifier, program

from fleetune.device_runtime.contracts.artifact import GOLDEN, open_artifact
from fleetune.device_runtime.contracts.manifest import Manifest, Port, Targets
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.assembly import Description
from fleetune.exporters.block_graphs import write_block_graphs
from fleetune.exporters.model.graph_file import Converters, GraphFile, GraphFiles, smallest_bounds
from fleetune.exporters.model.sections import SectionFunction

DESCRIPTION = Description("fake", "Classifier", "sequence-classification", tuple("abcde"), {})
Asked = list[tuple[str, tuple[int, int], str]]
USED = ("qkv.weight", "down.weight", "head.weight", "embed.weight")
"""The tensors that the graphs of the converters here read, each in the section that has it."""


def fake(asked: Asked) -> Converters:
    """Converters that note what they are asked, and whose graphs read only the tensors of USED."""

    def convert(section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32") -> GraphFiles:
        asked.append((section.what, sizes, base_dtype))
        ports = [
            Port(name=f"w{i}", role="weight", dtype="float32", shape=(), index=i)
            for i, name in enumerate(section.slots)
            if name.endswith(USED)
        ]
        role = "logits" if section.what == "head" else "hidden"
        out = Port(name="y", role=role, dtype="float32", shape=("batch",))
        first = GraphFile(section.what.encode(), tuple(ports[:1]), (out,), {"batch": 16, "seq": 128})
        second = GraphFile(b"second", tuple(ports), (out,), {"batch": 8})
        return {"forward": first, "backward": second}

    return Converters(convert, convert, convert, ".fake")


def write(out: Path, asked: Asked | None = None, *, base_dtype: str = "fp32") -> Manifest:
    torch.manual_seed(0)
    return write_block_graphs(
        program(Classifier((1.0, 2.0, 1.0))),
        DESCRIPTION,
        out,
        backend="fake",
        converters=fake([] if asked is None else asked),
        base_dtype=base_dtype,
    )


def test_every_converter_is_asked_once_and_in_the_same_words(tmp_path: Path) -> None:
    asked: Asked = []
    write(tmp_path / "a", asked, base_dtype="fp16")
    assert asked == [(what, (3, 37), "fp16") for what in ("prelude", "blocks.0", "blocks.1", "head")]


def test_the_folder_opens_and_holds_a_file_per_graph(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    assert open_artifact(tmp_path / "a").manifest == made
    files = sorted(path.name for path in (tmp_path / "a" / "graphs").iterdir())
    sections = ("block0", "block1", "head", "prelude")
    assert files == [f"{section}.{which}.fake" for section in sections for which in ("backward", "forward")]
    assert (tmp_path / "a" / made.kinds[1].graphs["forward"].file).read_bytes() == b"blocks.1"
    assert made.backend == "fake"
    assert made.bounds == {"batch": 8, "seq": 128}


def test_only_slots_that_a_graph_reads_remain_and_are_numbered_anew(tmp_path: Path) -> None:
    made = write(tmp_path / "a")
    for kind in made.kinds:
        assert [port.index for port in kind.graphs["backward"].inputs] == [0, 1]
    assert [layer.kind for layer in made.layers] == [0, 1, 0]
    for i, layer in enumerate(made.layers):
        names = [made.tensors[row].name for row in layer.tensors]
        assert names == [f"blocks.{i}.qkv.weight", f"blocks.{i}.down.weight"]
    everything = {name for name, _ in program(Classifier((1.0, 2.0, 1.0))).module.named_parameters()}
    outside = {made.tensors[row].name for row in (*made.prelude.tensors, *made.head.tensors)}
    assert outside == {name for name in everything if name.endswith(USED)}


def test_the_stages_are_told(tmp_path: Path) -> None:
    lines: list[str] = []
    made, converters = program(Classifier((1.0, 2.0))), fake([])
    write_block_graphs(
        made, DESCRIPTION, tmp_path / "a", backend="fake", converters=converters, on_progress=lines.append
    )
    assert lines[1] == "tracing 2 layers of 2 kinds in blocks"
    assert lines[-1] == "recording the golden step"


def test_a_converter_that_refuses_leaves_nothing(tmp_path: Path) -> None:
    def refuse(section: SectionFunction, **_: object) -> GraphFiles:
        raise KeyError(section.what)

    made = program(Classifier((1.0,)))
    with pytest.raises(KeyError, match="prelude"):
        write_block_graphs(
            made,
            DESCRIPTION,
            tmp_path / "a",
            backend="fake",
            converters=Converters(refuse, refuse, refuse, ""),
        )
    assert list(tmp_path.iterdir()) == []


def test_logits_that_ask_for_the_labels_are_refused_by_name(tmp_path: Path) -> None:
    def convert(section: SectionFunction, **_: object) -> GraphFiles:
        labels = Port(name="batch_2", role="batch", dtype="int64", shape=("batch",), index=2)
        return {"predict": GraphFile(b"", (labels,), ())}

    made = program(Classifier((1.0,)))
    with pytest.raises(ExportError, match=r"head \(predict\): the logits ask for labels, which prediction"):
        write_block_graphs(
            made,
            DESCRIPTION,
            tmp_path / "a",
            backend="fake",
            converters=Converters(convert, convert, convert, ""),
        )
    assert list(tmp_path.iterdir()) == []


def test_what_the_loss_is_a_mean_over_is_written_down(tmp_path: Path) -> None:
    assert write(tmp_path / "a").counted == Targets(shift=0, ignored=-100)


def test_the_golden_step_is_of_the_weights_as_they_are_stored(tmp_path: Path) -> None:
    whole, again = write(tmp_path / "a"), write(tmp_path / "b")
    assert whole.files[GOLDEN] == again.files[GOLDEN]
    assert np.array_equal(open_artifact(tmp_path / "a").base(whole.tensors[0]).shape, whole.tensors[0].shape)


def test_the_smallest_bound_counts() -> None:
    graphs = [
        {"a": GraphFile(b"", (), (), {"batch": 16})},
        {"b": GraphFile(b"", (), (), {"batch": 4, "seq": 9})},
    ]
    assert smallest_bounds(graphs) == {"batch": 4, "seq": 9}
    assert smallest_bounds([{"a": GraphFile(b"", (), ())}]) == {}
