"""A traced section as ``.pte`` graphs: decomposed for XNNPACK, tidied, then cut into what the device runs.

ExecuTorch plans memory for the largest sizes, so batch and sequence have bounds; they stand in the manifest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import SymInt, Tensor, dtype
from torch.export import ExportedProgram
from torch.fx import Node

from fleetune.device_runtime.contracts.manifest import LOGITS_BYTES, Port, Role
from fleetune.device_runtime.errors import ExportError
from fleetune.exporters.executorch.cut import inputs_of, outputs_of, part, saved_values
from fleetune.exporters.executorch.decompositions import DECOMPOSITIONS
from fleetune.exporters.executorch.lowering import lower, require
from fleetune.exporters.executorch.tidy import tidy
from fleetune.exporters.model.graph_file import Converters, GraphFile, GraphFiles
from fleetune.exporters.model.sections import SectionFunction
from fleetune.exporters.model.tracing import fixed_size, quiet, trace
from fleetune.exporters.storages import check_base_dtype

BOUNDS = (16, 128)
"""Largest batch and sequence, unless the model itself takes less."""
NOMINAL = {"batch": 16, "seq": 64}
"""Sizes at which saved activations are weighed against each other."""
_DTYPES = ("float32", "int64", "int32", "bool")


@dataclass(frozen=True)
class NodeRole:
    """A node that may enter or leave a graph, with its role and index."""

    node: Node
    role: Role
    index: int


class Traced:
    """A section's program with the role of every node that may enter or leave a graph."""

    def __init__(self, section: SectionFunction, sizes: tuple[int, int], *, base_dtype: str = "fp32") -> None:
        require()
        check_base_dtype(base_dtype, backend="executorch")
        self.section = section
        _check_dtypes(section)
        program = trace(
            section.function,
            [a.example for a in section.arguments],
            what=section.what,
            sizes=sizes,
            data=[a.is_data for a in section.arguments],
            decompositions=DECOMPOSITIONS,
            bounds=_asked(section, sizes),
            names=[a.role for a in section.arguments],
        )
        self.program = _functional(program)
        tidy(self.program.graph)
        self.inputs, self.outputs = inputs_of(self.program), outputs_of(self.program)
        self.symbols = _symbols(section, self.inputs, sizes)
        self.bounds = {} if section.targets else _bounds(self.program, self.symbols)

    def entering(self) -> list[NodeRole]:
        """Every input."""
        pairs = zip(self.inputs, self.section.arguments, strict=True)
        return [NodeRole(node, argument.role, argument.index) for node, argument in pairs]

    def leaving(self, *roles: Role) -> list[NodeRole]:
        """The outputs of ``roles``, or all."""
        pairs = zip(self.outputs, self.section.results, strict=True)
        return [NodeRole(node, role, i) for node, (role, i) in pairs if not roles or role in roles]

    def part(self, inputs: Sequence[NodeRole], outputs: Sequence[NodeRole]) -> ExportedProgram:
        """The program from those of ``inputs`` that it needs to ``outputs``."""
        return part(self.program, [i.node for i in inputs], [o.node for o in outputs])

    def graph(self, purpose: str, inputs: Sequence[NodeRole], outputs: Sequence[NodeRole]) -> GraphFile:
        """The graph from those of ``inputs`` that it needs to ``outputs``."""
        program = self.part(inputs, outputs)
        used = set(program.graph_signature.user_inputs)
        return GraphFile(
            lower(program, what=f"{self.section.what} ({purpose})").content,
            tuple(self._port(i, f"{i.role}_{i.index}") for i in inputs if i.node.name in used),
            tuple(self._port(o, f"{o.role}_{o.index}_out") for o in outputs),
            self.bounds,
        )

    def _port(self, end: NodeRole, name: str) -> Port:
        value: Tensor = end.node.meta["val"]
        shape = tuple(d if isinstance(d, int) else _named(d, self.symbols) for d in value.shape)
        return Port(name=name, role=end.role, dtype=_name(value.dtype), shape=shape, index=end.index)


def prelude_graphs(
    section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32"
) -> GraphFiles:
    """``forward``: batch -> hidden and sides."""
    traced = Traced(section, sizes, base_dtype=base_dtype)
    return {"forward": traced.graph("forward", traced.entering(), traced.leaving())}


def head_graphs(section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32") -> GraphFiles:
    """``train``: everything; ``predict``: logits alone, without labels."""
    traced = Traced(section, sizes, base_dtype=base_dtype)
    inputs = traced.entering()
    return {
        "train": traced.graph("train", inputs, traced.leaving()),
        "predict": traced.graph("predict", inputs, traced.leaving("logits")),
    }


def block_graphs(section: SectionFunction, *, sizes: tuple[int, int], base_dtype: str = "fp32") -> GraphFiles:
    """The joint graph cut into what a device runs, by the same purposes as the ONNX backend's."""
    traced = Traced(section, sizes, base_dtype=base_dtype)
    inputs, y = traced.entering(), traced.leaving("hidden")
    gradients = traced.leaving("d_hidden", "d_weight")
    own = traced.leaving("d_weight")
    extents = {symbol: NOMINAL[name] for symbol, name in traced.symbols.items()}
    gradient = next(i.node for i in inputs if i.role == "d_hidden")
    kept = saved_values(traced.program.graph, gradient, extents=extents)
    saved = [NodeRole(n, "saved", i) for i, n in enumerate(kept)]
    every = [*inputs, *saved]
    found = {
        "forward": traced.graph("forward", inputs, y),
        "forward_save": traced.graph("forward_save", inputs, [*y, *saved]),
        "backward": traced.graph("backward", every, gradients),
        "backward_recompute": traced.graph("backward_recompute", inputs, gradients),
    }
    if own:
        found["backward_lowest"] = traced.graph("backward_lowest", every, own)
        found["backward_lowest_recompute"] = traced.graph("backward_lowest_recompute", inputs, own)
    return found


def _functional(program: ExportedProgram) -> ExportedProgram:
    """Without operators that write into their inputs; few have any, and it means tracing again."""
    schemas = [getattr(node.target, "_schema", None) for node in program.graph.nodes]
    if not any(schema is not None and schema.is_mutable for schema in schemas):
        return program
    with quiet():
        functional: ExportedProgram = program.run_decompositions({})
    return functional


def _asked(section: SectionFunction, sizes: tuple[int, int]) -> tuple[int, int]:
    """A head that works token by token is given one row of as many tokens as fit into its chunk of logits."""
    if section.targets is None:
        return BOUNDS
    place = section.results.index(("logits", 0))
    width = section.function(*(a.example for a in section.arguments))[place].shape[-1]
    return sizes[0], max(sizes[1], min(BOUNDS[0] * BOUNDS[1], LOGITS_BYTES // (4 * width)))


def _check_dtypes(section: SectionFunction) -> None:
    """XNNPACK's products are float32; refuse the rest here, not on the device."""
    bad = [
        f"{a.name or a.role} is {_name(a.example.dtype)}"
        for a in section.arguments
        if _name(a.example.dtype) not in _DTYPES
    ]
    if bad:
        raise ExportError(
            f"{section.what}: the executorch backend takes {', '.join(_DTYPES)}; {', '.join(bad[:5])}"
        )


def _symbols(section: SectionFunction, inputs: Sequence[Node], sizes: tuple[int, int]) -> dict[str, str]:
    """Symbol -> ``batch`` or ``seq``; refuse a trace that fixed one of them."""
    names = dict(zip(sizes, NOMINAL, strict=True))
    symbols: dict[str, str] = {}
    for node, argument in zip(inputs, section.arguments, strict=True):
        for traced, extent in zip(node.meta["val"].shape, argument.example.shape, strict=True):
            if argument.is_data and extent in names:
                if not isinstance(traced, SymInt):
                    raise fixed_size(section.what, names[extent], argument.role)
                symbols[str(traced.node.expr)] = names[extent]
    return symbols


def _bounds(program: ExportedProgram, symbols: dict[str, str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for symbol, limits in program.range_constraints.items():
        name = symbols.get(str(symbol))
        if name is not None:
            found[name] = min(int(limits.upper), found.get(name, int(limits.upper)))
    return found


def _named(extent: SymInt, symbols: dict[str, str]) -> str:
    text = str(extent.node.expr)
    for symbol, name in symbols.items():
        text = text.replace(symbol, name)
    return text


def _name(kind: dtype) -> str:
    return str(kind).removeprefix("torch.")


CONVERTERS = Converters(prelude_graphs, block_graphs, head_graphs, ".pte")
