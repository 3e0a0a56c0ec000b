"""Commands of the workstation: export, inspect, selfcheck, sign, merge."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.exporters.storages import BASE_DTYPES, STORAGES
from fleetune.toolkit import live
from fleetune.toolkit.commands.fields import show_fields
from fleetune.toolkit.commands.options import (
    ArtifactDir,
    Config,
    Json,
    Out,
    Provider,
    Seed,
    StartAdapter,
    Threads,
    Verbose,
    listed,
    needs,
    shown,
)
from fleetune.toolkit.commands.running import Watch, call, fail, warn
from fleetune.toolkit.labels import HAS_CLASSES, PROBLEM_TYPES

_WORST = 5
_STARTING = "starting torch and transformers"


@needs("task", "out")
def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="local folder or hub id of a Hugging Face model")
    ],
    *,
    task: Annotated[
        str | None,
        shown(f"what it is for: {listed([*HAS_CLASSES])}", metavar="NAME"),
    ] = None,
    out: Out = None,
    num_labels: Annotated[int | None, shown("number of labels, for a new head")] = None,
    labels: Annotated[
        Path | None,
        shown("names of the classes: one a line, or a JSON list", "the checkpoint's own", metavar="FILE"),
    ] = None,
    problem_type: Annotated[
        str | None,
        shown(f"what a row's label is: {listed([*PROBLEM_TYPES])}", "the checkpoint's", metavar="NAME"),
    ] = None,
    adapter: StartAdapter = None,
    lora_r: Annotated[int | None, shown("rank of a new LoRA", "8")] = None,
    lora_alpha: Annotated[int | None, shown("scale of a new LoRA", "16")] = None,
    target_modules: Annotated[
        str | None,
        shown("modules that get a LoRA: a,b or all-linear or a regular expression", "peft's own choice"),
    ] = None,
    use_rslora: Annotated[
        bool | None,
        typer.Option("--use-rslora", help="scale a new LoRA by alpha / sqrt(r)", show_default=False),
    ] = None,
    use_dora: Annotated[
        bool | None, typer.Option("--use-dora", help="learn magnitudes beside a new LoRA", show_default=False)
    ] = None,
    backend: Annotated[
        str | None, shown(f"runtime of the devices: {listed([*STORAGES])}", "onnx", metavar="NAME")
    ] = None,
    base_dtype: Annotated[
        str | None, shown(f"frozen weights: {listed([*BASE_DTYPES])}", "fp32", metavar="NAME")
    ] = None,
    max_length: Annotated[int | None, shown("longest sequence, in tokens", "the model's own")] = None,
    seed: Seed = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Make a training artifact of a model."""
    call(
        "fleetune.toolkit.export:export",
        locals() | {"on_note": warn},
        argument="model",
        watch=Watch("on_progress", live.messages),
        show=_show_export,
        opening=_STARTING,
    )


def inspect(artifact_dir: ArtifactDir, *, json: Json = False, verbose: Verbose = False) -> None:
    """Show sizes, and the memory a run would take."""
    call(
        "fleetune.device_runtime.commands.inspect:inspect",
        locals(),
        argument="artifact_dir",
        show=_show_inspection,
    )


def selfcheck(
    artifact_dir: ArtifactDir,
    *,
    threads: Threads = None,
    provider: Provider = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Replay the recorded step and compare."""
    report = call(
        "fleetune.device_runtime.commands.selfcheck:selfcheck",
        locals(),
        argument="artifact_dir",
        watch=Watch("on_progress", live.messages),
        show=_show_selfcheck,
    )
    if not report.ok:
        fail(f"{artifact_dir}: relative error {report.max_relative_error:.2e} is above {report.limit:.0e}")


@needs("sign_key")
def sign(
    artifact_dir: ArtifactDir,
    *,
    sign_key: Annotated[
        Path | None, shown("private key (Ed25519, PEM), as aggregate has it", metavar="FILE")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say whose an artifact is: devices with --trust take no other."""
    call(
        "fleetune.device_runtime.commands.sign:sign",
        locals(),
        argument="artifact_dir",
        show=_show_signed,
    )


@needs("out")
def merge(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="folder made by train, aggregate or demo")],
    *,
    out: Out = None,
    full: Annotated[
        bool | None,
        typer.Option(
            "--full/--adapter-only", help="the whole merged model, or its adapter", show_default=False
        ),
    ] = None,
    onnx: Annotated[
        bool | None,
        typer.Option(
            "--onnx", help="the merged model as model.onnx, for onnxruntime alone", show_default=False
        ),
    ] = None,
    model: Annotated[
        str | None, shown("original model, if not where it was at export", metavar="MODEL")
    ] = None,
    labels: Annotated[
        Path | None, shown("label names for the merged model, as for export", "the run's", metavar="FILE")
    ] = None,
    task: Annotated[
        str | None, shown("as for export, if neither run nor model says it", metavar="NAME")
    ] = None,
    version: Annotated[int | None, shown("of an aggregator's run", "the last", metavar="N")] = None,
    artifact: Annotated[
        Path | None, shown("of the run, if it has no adapter yet; else to compare with", metavar="DIR")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Take a run's adapter or merged model out."""
    call(
        "fleetune.toolkit.merge:merge",
        locals(),
        argument="run",
        watch=Watch("on_progress", live.messages),
        show=_show_path,
        opening=_STARTING if full or onnx else "",
    )


def _show_selfcheck(console: Console, report: Any) -> None:
    worst = sorted(report.tensors.items(), key=lambda item: -item[1])[:_WORST]
    for name, error in worst:
        console.print(f"{error:.2e}  {name}", markup=False)
    verdict = "ok" if report.ok else "NOT OK"
    console.print(f"int8 products of this processor: {report.int8_path}", markup=False)
    largest = f"largest relative error {report.max_relative_error:.2e} (limit {report.limit:.0e})"
    console.print(f"{verdict}: {len(report.tensors)} tensors, {largest}", markup=False)


def _show_signed(console: Console, report: Any) -> None:
    console.print(f"artifact {report.artifact[:16]}… is signed by key {report.key}", markup=False)


def _show_export(console: Console, report: Any) -> None:
    """Show what was written; its notes were told when they came up."""
    sizes = {
        "frozen weights": report.base_bytes,
        "adapter": report.adapter_bytes,
        "graphs": report.graph_bytes,
    }
    kinds = f" of {report.num_kinds} kinds" if report.num_kinds > 1 else ""
    for line in (
        f"{report.out}: {report.architecture} for {report.task}, {report.num_layers} layers{kinds}",
        f"{', '.join(f'{live.size(n)} {name}' for name, n in sizes.items())}; {report.seconds:.0f} s",
        f"next: fleetune selfcheck {report.out}",
    ):
        console.print(line, markup=False)


def _show_path(console: Console, path: Path) -> None:
    console.print(str(path), markup=False)


def _show_inspection(console: Console, inspection: Any) -> None:
    show_fields(console, inspection)
    if not inspection.estimates:
        return
    console.print(
        "\nexpected peak memory of `fleetune train` in MB (10^6 bytes) by rows x tokens, with --recompute in brackets;\n"
        "half: as under --policy exact-k --drop 0.5",
        markup=False,
    )
    sizes = sorted({(e.batch_size, e.seq_len) for e in inspection.estimates})
    console.print(
        f"{'plan':>24}" + "".join(f"{f'{batch} x {seq}':>16}" for batch, seq in sizes), markup=False
    )
    peaks = {(e.plan, e.batch_size, e.seq_len, e.recompute): e.peak_mb for e in inspection.estimates}
    for plan in dict.fromkeys(e.plan for e in inspection.estimates):
        cells = [f"{peaks[(plan, *at, False)]:.0f} ({peaks[(plan, *at, True)]:.0f})" for at in sizes]
        console.print(f"{plan:>24}" + "".join(f"{cell:>16}" for cell in cells), markup=False)
