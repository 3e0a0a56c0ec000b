"""Writes an artifact of block graphs: the prelude, each kind of block and the head, as a backend's converters make them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import NamedTuple

import msgspec

from fleetune.device_runtime.contracts.artifact import GOLDEN
from fleetune.device_runtime.contracts.manifest import (
    FORWARD_STEP,
    STEP,
    Graph,
    Kind,
    Layer,
    Manifest,
    Port,
    Section,
)
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.assembly import Description, Structure, assemble, new_folder
from fleetune.exporters.model.anatomy import Anatomy, Call, find_anatomy, stream
from fleetune.exporters.model.golden import chained_plans, record_golden, single_plans
from fleetune.exporters.model.graph_file import (
    Converters,
    ConvertStep,
    GraphFile,
    GraphFiles,
    smallest_bounds,
)
from fleetune.exporters.model.int8_emulation import Int8Products
from fleetune.exporters.model.kinds import group_kinds
from fleetune.exporters.model.mapped import leaving
from fleetune.exporters.model.program import Program, tensors_of, traced_sizes
from fleetune.exporters.model.quantize import rounded, with_forms
from fleetune.exporters.model.sections import SectionFunction, Sections, functions_of
from fleetune.exporters.model.steps import Steps, block_step, find_steps, prelude_step
from fleetune.exporters.tensor_table import Slots, TensorTable, write_tensors


class SectionFiles(NamedTuple):
    """The graphs of one section as the manifest has them, and the weight slots that some of them read."""

    graphs: dict[str, Graph]
    slots: list[str]


class _Blocks(NamedTuple):
    """The blocks found: one call per kind, and the kind of each layer."""

    anatomy: Anatomy
    kinds: list[Call]
    of_layer: list[int]


def write_block_graphs(
    program: Program,
    description: Description,
    out: Path,
    *,
    backend: str,
    converters: Converters,
    base_dtype: str = "fp32",
    on_progress: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Export ``program`` into the folder ``out``, which is replaced if it is an artifact already.

    Raises:
        ExportError: no blocks, a trainable tensor that cannot learn, a loss that is no mean, logits that ask for labels, an
            operator without translation, or a folder in the way.
    """
    sizes = traced_sizes(program)
    with leaving(program.module):
        blocks = _find_blocks(program, sizes, on_progress)
        functions = functions_of(program, blocks.anatomy, blocks.kinds, sizes=sizes)
    graphs = convert_all(converters, functions, sizes=sizes, base_dtype=base_dtype)
    _check_predict(graphs.head, program)
    steps = None
    if converters.step and functions.head.targets and program.stepping:
        steps = _add_steps(
            program, blocks, graphs, converters.step, sizes=sizes, base_dtype=base_dtype, say=on_progress
        )
    with new_folder(out) as folder:
        on_progress("writing weights and graphs")
        written = write_graphs(folder, functions, graphs, suffix=converters.suffix)
        slots = Slots(written.prelude.slots, _layer_slots(blocks, written.kinds), written.head.slots)
        table = write_tensors(folder, program, slots)
        on_progress("recording the golden step")
        # Rounding is chaotic: through several int8 layers a value that rounds the other way spreads, through one it does not.
        plans_of = single_plans if base_dtype == "int8" else chained_plans
        with _as_stored(program, table, aside=folder):
            record_golden(
                program,
                blocks.anatomy,
                folder / GOLDEN,
                plans_of=plans_of,
                steps=steps,
                vocabulary=_vocabulary(graphs.head),
            )
        structure = Structure(
            inputs=program.inputs,
            prelude=Section(written.prelude.graphs, table.indices(slots.prelude)),
            kinds=tuple(Kind(kind.graphs) for kind in written.kinds),
            layers=_layers(blocks, table, slots.layers),
            head=Section(
                written.head.graphs,
                table.indices(slots.head),
                functions.head.targets,
                program.counted or "rows",
            ),
            tensors=table.rows,
            hidden_size=stream(blocks.anatomy.calls[0].output).shape[-1],
        )
        bounds = smallest_bounds(graphs)
        return assemble(folder, description, structure, backend=backend, base_dtype=base_dtype, bounds=bounds)


def convert_all(
    converters: Converters,
    functions: Sections[SectionFunction],
    *,
    sizes: tuple[int, int],
    base_dtype: str = "fp32",
) -> Sections[GraphFiles]:
    """Every section's graph files."""
    return Sections(
        converters.prelude(functions.prelude, sizes=sizes, base_dtype=base_dtype),
        [converters.block(kind, sizes=sizes, base_dtype=base_dtype) for kind in functions.kinds],
        converters.head(functions.head, sizes=sizes, base_dtype=base_dtype),
    )


def write_graphs(
    folder: Path, functions: Sections[SectionFunction], graphs: Sections[GraphFiles], *, suffix: str
) -> Sections[SectionFiles]:
    """Write every graph as ``graphs/SECTION.PURPOSE`` and ``suffix``."""
    (folder / "graphs").mkdir()
    names = ["prelude", *(f"block{i}" for i in range(len(graphs.kinds))), "head"]
    first, *kinds, last = (
        _write_section(folder, files, with_forms(function.slots), pattern=f"graphs/{name}.{{}}{suffix}")
        for name, files, function in zip(names, graphs, functions, strict=True)
    )
    return Sections(first, kinds, last)


def _add_steps(
    program: Program,
    blocks: _Blocks,
    graphs: Sections[GraphFiles],
    convert: ConvertStep,
    *,
    sizes: tuple[int, int],
    base_dtype: str,
    say: Callable[[str], None],
) -> Steps | None:
    """Give prelude and kinds the graphs that run on new tokens alone; None, told why, where the model cannot do so."""
    try:
        with leaving(program.module):
            steps = find_steps(program, blocks.anatomy, sizes=sizes)
        if steps is None:
            return None
        made = [convert(prelude_step(steps), sizes=steps.sizes, base_dtype=base_dtype)]
        for kind in range(len(blocks.kinds)):
            section = block_step(steps, blocks.of_layer.index(kind))
            made.append(convert(section, sizes=steps.sizes, base_dtype=base_dtype))
            _check_weights(made[-1], graphs.kinds[kind])
    except ExportError as reason:
        say(f"no graphs for single tokens, so `generate` runs all of them again for each: {reason}")
        return None
    for files, purpose, step in zip(
        (graphs.prelude, *graphs.kinds), (STEP, *repeat(FORWARD_STEP, len(made))), made, strict=False
    ):
        files[purpose] = step
    return steps


def _check_weights(step: GraphFile, files: GraphFiles) -> None:
    """Refuse a step that reads a weight in another form than the block's forward does."""
    read, known = (
        {port.index for port in graph.inputs if port.role == "weight"} for graph in (step, files["forward"])
    )
    if read - known:
        raise ExportError(f"weights in another form than the forward's: {len(read - known)}")


def _check_predict(head: GraphFiles, program: Program) -> None:
    """Prediction has all of a batch but its labels."""
    ports = [port for purpose, graph in head.items() for port in graph.inputs if purpose == "predict"]
    if program.label_name in [program.inputs[port.index].name for port in ports if port.role == "batch"]:
        raise ExportError(
            f"head (predict): the logits ask for {program.label_name}, which prediction does not have"
        )


def _vocabulary(head: GraphFiles) -> int:
    """Classes of each token; 0 where a row has one answer."""
    shape = next(port.shape for graph in head.values() for port in graph.outputs if port.role == "logits")
    return int(shape[-1]) if len(shape) == 3 else 0


def _find_blocks(program: Program, sizes: tuple[int, int], on_progress: Callable[[str], None]) -> _Blocks:
    on_progress("finding the blocks")
    anatomy = find_anatomy(program, batch=sizes[0], seq=sizes[1])
    kinds, of_layer = group_kinds(anatomy)
    counted = f"{len(kinds)} kind{'s' * (len(kinds) > 1)}"
    on_progress(f"tracing {len(anatomy.calls)} layers of {counted} in {anatomy.path}")
    return _Blocks(anatomy, kinds, of_layer)


def _layer_slots(blocks: _Blocks, kinds: Sequence[SectionFiles]) -> list[list[str]]:
    """The slots of each layer: those of its kind, under the layer's own path."""
    return [
        [f"{call.path}.{slot.removeprefix(f'{blocks.kinds[kind].path}.')}" for slot in kinds[kind].slots]
        for call, kind in zip(blocks.anatomy.calls, blocks.of_layer, strict=True)
    ]


def _layers(blocks: _Blocks, table: TensorTable, slots: Sequence[Sequence[str]]) -> tuple[Layer, ...]:
    return tuple(
        Layer(kind, table.indices(slots[i]), blocks.anatomy.side_indices(i))
        for i, kind in enumerate(blocks.of_layer)
    )


@contextmanager
def _as_stored(program: Program, table: TensorTable, *, aside: Path) -> Iterator[None]:
    """For the duration, ``program`` computes with its frozen weights as they were stored."""
    tensors = tensors_of(program.module)
    with (
        rounded(tensors, table.stored, aside=aside),
        Int8Products(tensors, table.stored),
        leaving(program.module),
    ):
        yield


def _write_section(folder: Path, files: GraphFiles, slots: Sequence[str], *, pattern: str) -> SectionFiles:
    """Write a section's graphs; of its weight slots only those that some graph reads remain."""
    ports = [port for graph in files.values() for port in (*graph.inputs, *graph.outputs)]
    used = sorted({port.index for port in ports if _is_slot(port)})
    place = {old: new for new, old in enumerate(used)}
    graphs = {}
    for purpose, graph in files.items():
        path = pattern.format(purpose)
        (folder / path).write_bytes(graph.content)
        graphs[purpose] = _described(path, graph, place)
    return SectionFiles(graphs, [slots[old] for old in used])


def _described(path: str, graph: GraphFile, place: Mapping[int, int]) -> Graph:
    inputs, outputs = (
        tuple(msgspec.structs.replace(p, index=place[p.index]) if _is_slot(p) else p for p in ports)
        for ports in (graph.inputs, graph.outputs)
    )
    return Graph(path, inputs, outputs)


def _is_slot(port: Port) -> bool:
    return port.role in ("weight", "d_weight")
