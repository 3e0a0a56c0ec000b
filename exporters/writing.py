"""Puts an artifact folder together: graphs, tensor table, weights, adapter, golden step, manifest. Whole or not at all."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fleetune.device_runtime.arrays import sha256_of
from fleetune.device_runtime.contracts.artifact import ADAPTER, BASE, GOLDEN, MANIFEST
from fleetune.device_runtime.contracts.manifest import (
    FORMAT,
    FileDigest,
    Graph,
    Kind,
    Layer,
    Manifest,
    Port,
    Section,
    Tokenizer,
)
from fleetune.device_runtime.contracts.manifest import Tensor as Row
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.backends import BACKENDS, convert_all
from fleetune.exporters.model.anatomy import Anatomy, find_anatomy, stream
from fleetune.exporters.model.golden import chained_plans, record_golden, single_plans
from fleetune.exporters.model.graph_file import GraphFile
from fleetune.exporters.model.int8_emulation import Int8Products
from fleetune.exporters.model.kinds import group_kinds
from fleetune.exporters.model.program import Program, tensors_of, traced_sizes, trainable_names
from fleetune.exporters.model.quantize import check_base_dtype, derive, rounded, split_form, with_forms
from fleetune.exporters.model.sections import block, head, prelude
from fleetune.exporters.weights_file import write_base

TOKENIZER = "tokenizer.json"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Description:
    """What the manifest says of the model beside its graphs."""

    name: str
    architecture: str
    task: str
    labels: tuple[str, ...]
    peft: dict[str, Any]
    tokenizer: bytes | None = None
    pad_id: int = 0
    max_length: int = 512
    licences: dict[str, str] = field(default_factory=dict)


def write_artifact(
    program: Program,
    description: Description,
    out: Path,
    *,
    backend: str = "onnx",
    base_dtype: str = "fp32",
    on_progress: Progress = lambda _: None,
) -> Manifest:
    """Export ``program`` into the folder ``out`` (replaced if it is an artifact already).

    With ``base_dtype`` fp16 or int8 the golden step is that of the module with its frozen weights rounded as they are stored.

    Raises:
        ConfigError: no such storage of frozen weights.
        ExportError: no blocks, a trainable tensor that cannot learn, an operator without translation, or a folder in the way.
    """
    chosen = BACKENDS[backend]
    check_base_dtype(base_dtype, backend=backend, taken=chosen.base_dtypes)
    sizes = traced_sizes(program)
    on_progress("finding the blocks")
    anatomy = find_anatomy(program, batch=sizes[0], seq=sizes[1])
    kinds, of_layer = group_kinds(anatomy)
    on_progress(
        f"tracing {len(anatomy.calls)} layers of {len(kinds)} kind{'s' * (len(kinds) > 1)} in {anatomy.path}"
    )
    sections = (
        prelude(program, anatomy, sizes=sizes),
        [block(call, prefix=f"{call.path}.") for call in kinds],
        head(program, anatomy, sizes=sizes),
    )
    graphs = convert_all(chosen, *sections, sizes=sizes, base_dtype=base_dtype)
    with new_folder(out) as folder:
        on_progress("writing weights and graphs")
        table = TensorTable(program, anatomy)
        files = _Graphs(folder, chosen.suffix)
        made_prelude = _section(files, "prelude", graphs.prelude, with_forms(sections[0].slots))
        made_kinds = [
            _section(files, f"block{i}", g, with_forms(s.slots))
            for i, (g, s) in enumerate(zip(graphs.kinds, sections[1], strict=True))
        ]
        made_head = _section(files, "head", graphs.head, with_forms(sections[2].slots))
        layer_slots = [
            [f"{call.path}.{slot.removeprefix(f'{kinds[k].path}.')}" for slot in made_kinds[k].slots]
            for call, k in zip(anatomy.calls, of_layer, strict=True)
        ]
        rows = table.write(folder, made_prelude.slots, layer_slots, made_head.slots)
        index = {row.name: i for i, row in enumerate(rows)}
        on_progress("recording the golden step")
        # Rounding is chaotic: through several int8 layers a value that rounds the other way spreads, through one it does not.
        plans_of = single_plans if base_dtype == "int8" else chained_plans
        with rounded(table.tensors, table.written), Int8Products(table.tensors, table.written):
            record_golden(program, anatomy, folder / GOLDEN, plans_of=plans_of)
        if description.tokenizer is not None:
            (folder / TOKENIZER).write_bytes(description.tokenizer)
        manifest = Manifest(
            format=FORMAT,
            name=description.name,
            architecture=description.architecture,
            task=description.task,
            backend=backend,
            labels=description.labels,
            inputs=program.inputs,
            prelude=Section(made_prelude.graphs, table.indices(made_prelude.slots, index)),
            kinds=tuple(Kind(k.graphs) for k in made_kinds),
            layers=tuple(
                Layer(k, table.indices(slots, index), anatomy.side_indices(i))
                for i, (k, slots) in enumerate(zip(of_layer, layer_slots, strict=True))
            ),
            head=Section(made_head.graphs, table.indices(made_head.slots, index), sections[2].targets),
            tensors=tuple(rows),
            files=digests_of(folder),
            hidden_size=stream(anatomy.calls[0].output).shape[-1],
            peft=description.peft,
            base_dtype=base_dtype,
            tokenizer=tokenizer_row(description),
            bounds=graphs.bounds,
            licences=description.licences,
            versions={name: version(name) for name in ("fleetune", "torch", "onnx")},
        )
        (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest), indent=1))
    return manifest


@dataclass(frozen=True)
class _Made:
    graphs: dict[str, Graph]
    slots: list[str]


@dataclass(frozen=True)
class _Graphs:
    folder: Path
    suffix: str

    def add(self, name: str, graph: GraphFile, slots: Mapping[int, int]) -> Graph:
        path = Path("graphs") / f"{name}{self.suffix}"
        (self.folder / path).parent.mkdir(exist_ok=True)
        (self.folder / path).write_bytes(graph.content)
        return Graph(path.as_posix(), _renumbered(graph.inputs, slots), _renumbered(graph.outputs, slots))


def _section(files: _Graphs, name: str, graphs: dict[str, GraphFile], slots: Sequence[str]) -> _Made:
    """Write a section's graphs; of its weight slots only those that some graph reads remain."""
    ports = [port for graph in graphs.values() for port in (*graph.inputs, *graph.outputs)]
    used = sorted({port.index for port in ports if port.role in ("weight", "d_weight")})
    place = {old: new for new, old in enumerate(used)}
    made = {purpose: files.add(f"{name}.{purpose}", graph, place) for purpose, graph in graphs.items()}
    return _Made(made, [slots[old] for old in used])


def _renumbered(ports: tuple[Port, ...], slots: Mapping[int, int]) -> tuple[Port, ...]:
    return tuple(
        msgspec.structs.replace(port, index=slots[port.index])
        if port.role in ("weight", "d_weight")
        else port
        for port in ports
    )


class TensorTable:
    """Collects the tensors that slots name, each once however often it is tied."""

    def __init__(self, program: Program, anatomy: Anatomy) -> None:
        self._names = program.names
        self._trainable = set(trainable_names(program.module))
        self.tensors = tensors_of(program.module)
        self.written: list[str] = []
        self._first_name = {id(t): name for name, t in reversed(list(self.tensors.items()))}
        self._aliases = {n: self._first_name[id(t)] for n, t in _all_tensors(program)}

    def write(
        self, folder: Path, prelude_slots: list[str], layer_slots: list[list[str]], head_slots: list[str]
    ) -> list[Row]:
        """Write the base and the adapter file; one row per tensor that some slot names."""
        spans = [(-1, prelude_slots), *enumerate(layer_slots), (-1, head_slots)]
        placed: dict[str, int] = {}
        frozen, learning = [], {}
        for layer, slots in spans:
            fresh = [n for n in dict.fromkeys(map(self._own, slots)) if n not in placed]
            placed.update(dict.fromkeys(fresh, layer))
            frozen.append([(self._name(n), self._stored(n)) for n in fresh if n not in self._trainable])
            learning.update(
                {self._name(n): self.tensors[n].detach().contiguous() for n in fresh if n in self._trainable}
            )
        self.written = list(placed)
        layer_of = {self._name(n): layer for n, layer in placed.items()}
        rows = [_row(p.name, p.tensor, p.offset, layer_of) for p in write_base(folder / BASE, frozen)]
        save_file(learning, folder / ADAPTER)
        offsets = _offsets(folder / ADAPTER)
        return rows + [_row(n, t, offsets[n], layer_of, trainable=True) for n, t in learning.items()]

    def indices(self, slots: list[str], index: Mapping[str, int]) -> tuple[int, ...]:
        """Rows of the tensors in ``slots``; ``index`` is the row of each tensor by its name in the table."""
        return tuple(index[self._name(self._own(slot))] for slot in slots)

    def _own(self, slot: str) -> str:
        """The slot under the first name of its tensor, so that what is tied is one."""
        name, form = split_form(slot)
        return f"{self._aliases[name]}:{form}" if form else self._aliases[name]

    def _name(self, own: str) -> str:
        name, form = split_form(own)
        return self._names.get(name, name) + (f":{form}" if form else "")

    def _stored(self, own: str) -> Tensor:
        name, form = split_form(own)
        return derive(name, self.tensors[name], form)


def _all_tensors(program: Program) -> Iterator[tuple[str, Tensor]]:
    yield from program.module.named_parameters(remove_duplicate=False)
    yield from program.module.named_buffers(remove_duplicate=False)


def _row(
    name: str, tensor: Tensor, offset: int, layer_of: Mapping[str, int], *, trainable: bool = False
) -> Row:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return Row(
        name,
        "adapter" if trainable else "base",
        dtype,
        tuple(tensor.shape),
        offset,
        layer_of[name],
        trainable,
    )


def _offsets(path: Path) -> dict[str, int]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    with safe_open(path, "np") as file:
        return {name: 8 + length + header[name]["data_offsets"][0] for name in file.keys()}  # noqa: SIM118


def tokenizer_row(description: Description) -> Tokenizer | None:
    """How text becomes arrays, if the model reads text."""
    return (
        None
        if description.tokenizer is None
        else Tokenizer(TOKENIZER, description.pad_id, description.max_length)
    )


def digests_of(folder: Path) -> dict[str, FileDigest]:
    """Digest and size of every file under ``folder``, by its path inside."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): FileDigest(sha256_of(p), p.stat().st_size) for p in files}


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its place when all went well."""
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out}: exists and is not an artifact; choose another --out")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        shutil.rmtree(out, ignore_errors=True)
        part.rename(out)
    finally:
        shutil.rmtree(part, ignore_errors=True)
