"""The only file of the exporters that knows ExecuTorch: a program becomes the bytes of a ``.pte`` file, delegated to XNNPACK."""

from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from torch.export import ExportedProgram

from fleetune.device_runtime.errors import ConfigError, ExportError
from fleetune.exporters.model.tracing import quiet

INSTALL = "pip install 'fleetune[executorch]' (it brings executorch==1.4.1)"
# What XNNPACK is given. Copies are not: its preprocessing drops them, and then refuses a run that only passes its input through.
_TAKEN_NAMES = """
    linear.default bmm.default add.Tensor sub.Tensor mul.Tensor div.Tensor neg.default abs.default exp.default log.default
    sqrt.default rsqrt.default pow.Tensor_Scalar clamp.default hardtanh.default maximum.default minimum.default relu.default
    sigmoid.default tanh.default gelu.default sin.default cos.default _softmax.default permute_copy.default view_copy.default
    unsqueeze_copy.default slice_copy.Tensor
"""
_TAKEN = frozenset(_TAKEN_NAMES.split())
# With this specification XNNPACK runs one of its 17 preprocessing passes; the others are about operators that are not in _TAKEN.
_ONE_PASS = "dqlinear_partitioner"


class Lowered(NamedTuple):
    """A ``.pte`` file, and the operators that portable kernels run because XNNPACK does not take them, with their count."""

    content: bytes
    portable: dict[str, int]


def require() -> None:
    """Refuse before anything is traced.

    Raises:
        ConfigError: ExecuTorch is not installed; names the command.
    """
    try:
        version("executorch")
    except PackageNotFoundError as exc:
        raise ConfigError(f"the executorch backend is not installed: {INSTALL}") from exc


def lower(program: ExportedProgram, *, what: str) -> Lowered:
    """Delegate what XNNPACK takes and serialise; inputs and outputs are the caller's memory.

    Raises:
        ConfigError: ExecuTorch is not installed.
        ExportError: an operator that the runtime has no kernel for, by name.
    """
    require()
    with quiet():
        from executorch.backends.xnnpack.partition.config import ALL_PARTITIONER_CONFIGS
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
        from executorch.exir.backend.compile_spec_schema import CompileSpec
        from executorch.exir.backend.partitioner import DelegationSpec
        from executorch.exir.passes import MemoryPlanningPass

        taken = [c for c in ALL_PARTITIONER_CONFIGS if c.target_name in _TAKEN]
        partitioner = XnnpackPartitioner(taken, force_non_static_weights_for_f32_linear=True)
        partitioner.delegation_spec = DelegationSpec("XnnpackBackend", [CompileSpec(_ONE_PASS, b"")])
        memory = MemoryPlanningPass(alloc_graph_input=False)
        try:
            edge = to_edge_transform_and_lower(
                _decomposed(program),
                partitioner=[partitioner],
                compile_config=EdgeCompileConfig(_check_ir_validity=False),
            )
            found = edge.to_executorch(ExecutorchBackendConfig(memory_planning_pass=memory))
        except Exception as exc:
            reason = (str(exc).strip().splitlines() or [type(exc).__name__])[0]
            raise ExportError(f"{what}: ExecuTorch does not take it: {reason}") from exc
        _check_kernels(found.executorch_program, what)
        return Lowered(bytes(found.buffer), _portable(edge.exported_program().graph))


class _Decomposed(ExportedProgram):
    """A program in core operators already, as it was traced: decomposing it would trace it three times more, half of lowering."""

    def run_decompositions(self, *_: Any, **__: Any) -> ExportedProgram:
        return self


def _decomposed(program: ExportedProgram) -> ExportedProgram:
    return _Decomposed(
        program.graph_module,
        program.graph,
        program.graph_signature,
        program.state_dict,
        program.range_constraints,
        program.module_call_graph,
        constants=program.constants,
    )


def _check_kernels(program: Any, what: str) -> None:
    from executorch.runtime import Runtime

    known = set(Runtime.get().operator_registry.operator_names)
    used = {f"{o.name}.{o.overload}".rstrip(".") for o in program.execution_plan[0].operators}
    if used - known:
        raise ExportError(f"{what}: ExecuTorch's runtime has no kernel for {', '.join(sorted(used - known))}")


def _portable(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if node.op == "call_function" and schema is not None and "sym_size" not in schema.name:
            counts[schema.name] = counts.get(schema.name, 0) + 1
    return counts
