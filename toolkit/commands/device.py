"""Commands of one device without a network: train, predict, generate."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from fleetune.device_runtime.contracts.scores import LABELS, PERPLEXITY
from fleetune.toolkit import live
from fleetune.toolkit.commands.options import (
    GENERATE,
    PREDICT,
    TRAIN,
    ArtifactDir,
    Config,
    Data,
    HeadStart,
    Json,
    LogTo,
    Out,
    Rules,
    StartAdapter,
    Threads,
    Verbose,
    needs,
    shown,
    with_flags,
)
from fleetune.toolkit.commands.running import Watch, call, warn


@needs("data", "out")
@with_flags(TRAIN)
def train(
    artifact_dir: ArtifactDir,
    *,
    data: Data = None,
    out: Out = None,
    eval: Annotated[Path | None, shown("labelled data to measure the result on", metavar="FILE")] = None,
    checkpoint_every: Annotated[
        int | None, shown("steps between checkpoints, and one a minute; 0 for none but the last", "50")
    ] = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--no-resume",
            help="go on from what is in --out, as without either, or train anew and replace it",
            show_default=False,
        ),
    ] = None,
    adapter: StartAdapter = None,
    head_start: HeadStart = None,
    class_weights: Annotated[
        str | None,
        shown("weights of the classes in the training loss: balanced, or a=2,b=1, 1 for the others"),
    ] = None,
    rules: Rules = None,
    log_to: LogTo = None,
    config: Config = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Train on this machine, without a network.

    Ctrl-C stops it between two steps. The same command again goes on, also after a kill; with more --steps or --epochs it goes on
    from the end of a finished run.
    """
    call(
        "fleetune.device_runtime.commands.train:train",
        locals(),
        argument="artifact_dir",
        parts=TRAIN,
        watch=Watch("on_step", live.steps, notes="on_note"),
        show=_show_run,
    )


@with_flags(PREDICT)
def predict(
    artifact_dir: ArtifactDir,
    *,
    text: Annotated[list[str] | None, shown("a text; may be given several times", metavar="TEXT")] = None,
    data: Annotated[
        Path | None,
        shown("a file or folder as for train; labels in it are looked at only with --out", metavar="FILE"),
    ] = None,
    run: Annotated[
        Path | None, shown("folder of train, aggregate or demo whose adapter to use", metavar="DIR")
    ] = None,
    adapter: Annotated[Path | None, shown("PEFT adapter folder to use", metavar="DIR")] = None,
    out: Annotated[
        Path | None,
        shown("folder for evaluation.json and evaluation.csv, from the labels in --data", metavar="DIR"),
    ] = None,
    batch_size: Annotated[int | None, shown("samples at a time", "32")] = None,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Use the personalised model."""
    call(
        "fleetune.device_runtime.commands.predict:predict",
        locals(),
        argument="artifact_dir",
        parts=PREDICT,
        watch=Watch("on_progress", live.samples, notes="on_note", aside=True),
        show=_show_predictions,
    )


@with_flags(GENERATE)
def generate(
    artifact_dir: ArtifactDir,
    *,
    prompt: Annotated[str | None, shown("text to go on from", "standard input", metavar="TEXT")] = None,
    file: Annotated[Path | None, shown("file of the text to go on from; - for standard input")] = None,
    chat: Annotated[
        bool, shown("the prompt is what a user says; the artifact's chat template writes it")
    ] = False,
    system: Annotated[str | None, shown("said before it, in a chat", "nothing", metavar="TEXT")] = None,
    adapter: Annotated[
        Path | None,
        shown("folder of train, aggregate or demo, or a PEFT folder, whose adapter to use", metavar="DIR"),
    ] = None,
    stop: Annotated[
        list[str] | None, shown("a text that ends it; may be given several times", metavar="TEXT")
    ] = None,
    threads: Threads = None,
    json: Json = False,
    verbose: Verbose = False,
    **flags: Any,
) -> None:
    """Have the personalised language model write on."""
    given = locals() | {"on_note": warn}
    if prompt is None and file is None:
        given["file"] = Path("-")
    call(
        "fleetune.device_runtime.commands.generate:generate",
        given,
        argument="artifact_dir",
        parts=GENERATE,
        watch=Watch("on_text", _written),
        show=_show_generation,
    )


@contextmanager
def _written(console: Console) -> Iterator[Callable[[str], None]]:
    """Write text as it comes, and end its last line."""

    def write(text: str) -> None:
        console.file.write(text)
        console.file.flush()

    yield write
    write("\n")


def _show_generation(console: Console, report: Any) -> None:
    speed = f"{report.tokens_per_s:.1f} tokens/s, " if report.tokens_per_s else ""
    warn(
        f"{report.tokens} tokens after {report.prompt_tokens}, {speed}ended by: {report.ended}; "
        f"{live.size(2**20 * report.peak_rss_mb)} at most"
    )


def _show_run(console: Console, report: Any) -> None:
    for line in (*_measured(report), *_trained(report), f"adapter: {report.adapter}"):
        console.print(line, markup=False)


def _measured(report: Any) -> Iterator[str]:
    score = next((name for name in LABELS if name != PERPLEXITY and getattr(report, name) is not None), None)
    figures = {
        "loss": report.eval_loss,
        "micro F1": report.micro_f1,
        "macro F1": report.macro_f1,
        "perplexity": report.perplexity,
        "mean absolute error": report.mae,
        "Pearson": report.pearson,
    }
    shown = ", ".join(f"{name} {value:.4f}" for name, value in figures.items() if value is not None)
    if score:
        value = getattr(report, score)
        yield f"{LABELS[score]} {value:.3f} on held-out data ({shown or 'the loss is not finite'})"
    elif shown:
        yield f"on held-out data: {shown}"


def _trained(report: Any) -> Iterator[str]:
    losses = f"loss {report.loss_first:.4f} -> {report.loss_last:.4f}"
    if report.epsilon is not None:
        yield f"each sample hidden in the adapter: epsilon {report.epsilon:.4g} at delta 1e-05"
    yield f"{report.steps} steps on {report.num_samples} samples, {losses}"
    memory = live.size(2**20 * report.peak_rss_mb)
    yield f"{report.step_ms_median:.0f} ms a step, {memory} at most, {report.mean_active_layers:.1f} layers active"
    if report.pauses:
        yield f"paused {report.pauses} times by the rules, {report.paused_s:.0f} s in all"


def _show_predictions(console: Console, predictions: list[Any]) -> None:
    for prediction in predictions:
        console.print(f"{_answer(prediction)}  {prediction.text or ''}".rstrip(), markup=False)


def _answer(prediction: Any) -> str:
    """A class with its probability, the labels with theirs, or the numbers."""
    if hasattr(prediction, "values"):
        return "  ".join(f"{value:.4g}" for value in prediction.values.values())
    if hasattr(prediction, "scores"):
        return ", ".join(f"{prediction.scores[name]:.3f} {name}" for name in prediction.labels) or "none"
    return f"{prediction.score:.3f}  {prediction.label}"
