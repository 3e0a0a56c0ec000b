"""``fleetune train``: one device, no network. A run that was stopped goes on when it is started again with the same arguments."""

import logging
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fleetune.device_runtime.arrays import Arrays
from fleetune.device_runtime.commands.evaluating import (
    forget_evaluations,
    keep_evaluation,
    measure,
    write_evaluation,
)
from fleetune.device_runtime.commands.train_report import TrainReport, as_measured, report_of
from fleetune.device_runtime.contracts.accounting import DELTA, epsilon_of_steps, steps_of
from fleetune.device_runtime.contracts.adapters import load_peft, save_peft
from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.class_means import class_head
from fleetune.device_runtime.contracts.evaluation_file import Evaluated, EvaluationFile
from fleetune.device_runtime.contracts.gaussian import NOISE_SECRET, new_secret
from fleetune.device_runtime.contracts.lora import lora_problems
from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.contracts.resources import Resources
from fleetune.device_runtime.contracts.run_file import (
    ADAPTER,
    BEST,
    CHECKPOINT,
    LEDGER,
    RUN,
    plain,
    write_run,
)
from fleetune.device_runtime.contracts.texts_apart import holds_apart
from fleetune.device_runtime.contracts.work import HEAD_STARTS, LocalWork
from fleetune.device_runtime.data.columns import Columns
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.data.packing import NOT_APART, packed
from fleetune.device_runtime.data.samples import Cut
from fleetune.device_runtime.data.sequences import Sequences
from fleetune.device_runtime.data.splitting import split_off
from fleetune.device_runtime.errors import ConfigError, UnknownName, choices
from fleetune.device_runtime.files import DiskFiles
from fleetune.device_runtime.methods.class_means import class_mean_head
from fleetune.device_runtime.methods.work import check_work
from fleetune.device_runtime.options import refuse
from fleetune.device_runtime.rules.gate import Pause, open_gate
from fleetune.device_runtime.training.budget import Fit
from fleetune.device_runtime.training.early_stopping import Watch, key_of
from fleetune.device_runtime.training.evaluating import Evaluating
from fleetune.device_runtime.training.machine import Machine
from fleetune.device_runtime.training.resumable import Pace, finish
from fleetune.device_runtime.training.step_reports import StepReport
from fleetune.device_runtime.training.trainer import Trainer

log = logging.getLogger(__name__)

CACHE = "cache"
_CHECKPOINT_EVERY_S = 60.0

Note = Callable[[Pause | Fit | Cut | Evaluated | str], object]


def train(
    artifact_dir: Path | str,
    *,
    data: Path | str,
    out: Path | str,
    eval: Path | str | None = None,
    columns: Columns = Columns(),
    sequences: Sequences = Sequences(),
    evaluating: Evaluating = Evaluating(),
    work: LocalWork = LocalWork(),
    resources: Resources = Resources(),
    checkpoint_every: int = 50,
    resume: bool = True,
    adapter: Path | str | None = None,
    head_start: str = "none",
    class_weights: str = "",
    rules: Mapping[str, Any] | Path | str | None = None,
    on_step: Callable[[StepReport], object] | None = None,
    on_note: Note | None = None,
) -> TrainReport:
    """Train an artifact's adapter on this machine and write it to ``out`` as a PEFT folder.

    SIGINT and SIGTERM stop it between two steps, and it saves what it has first. The same arguments go on from there; those
    of a run that is finished train nothing. More steps go on from its end.

    Args:
        artifact_dir: folder made by ``fleetune export``.
        data: labelled samples; see :func:`fleetune.device_runtime.data.loading.load_dataset`.
        out: folder for ``adapter/`` and ``run.json``, replaced at the end, and ``checkpoint.safetensors``; with held-out
            samples for ``evaluation.json``, ``evaluation.csv`` and ``evaluations.jsonl`` too.
        eval: labelled samples to measure the result on, at full depth.
        columns: where the data's rows have the text and the label, those of ``eval`` too.
        sequences: how the texts of a causal language model become sequences, those of ``eval`` too; what is measured on is
            never packed.
        evaluating: a share of ``data`` to measure the result on, in the place of ``eval``; how often that is done, and when it
            stops for it. With ``patience`` the adapter of the lowest loss is what is kept.
        work: policy, optimizer, steps, batches and seed; its codec has no say here.
        resources: threads, memory and disk that the run may use.
        checkpoint_every: steps between checkpoints, of which there is one a minute too; 0 for none but the last.
        resume: False starts anew though there is a checkpoint, or a finished run.
        adapter: PEFT folder to start from, instead of the artifact's own version 0.
        head_start: what the head begins with: ``none`` for as it was exported (or as ``adapter`` has it), ``class-mean`` for the
            class means of ``data``, from one forward pass before the first step.
        class_weights: of the training loss: ``balanced``, or ``a=2,b=1`` by the names of the classes, 1 for the others. Measured
            is without them.
        rules: when it may train, a TOML file or a mapping; see ``docs/device-rules.md``. Changes no result.
        on_step: called with each step's report.
        on_note: called with what a person may want to read: texts that are cut, a memory budget's choice, a pause by the
            rules and its end, where it goes on from and where it stopped, what an evaluation found.

    Raises:
        FleetuneError: ArtifactError, ConfigError or DataError, by what has to be mended.
    """
    arguments = plain(locals())
    tell: Note = on_note or _log
    if checkpoint_every < 0:
        raise ConfigError(f"checkpoint_every must be at least 0, got {checkpoint_every}")
    if head_start not in HEAD_STARTS:
        raise UnknownName(f"no head_start {head_start!r}; have: {choices(HEAD_STARTS)}")
    evaluating.check(has_eval=bool(eval))
    gate = open_gate(rules, on_change=tell)
    folder = _make_folder(Path(out), resume=resume)
    artifact = open_artifact(artifact_dir)
    manifest = artifact.manifest
    check_work(work, manifest.num_layers, learning=len(manifest.learning))
    head = class_head(manifest) if head_start == "class-mean" else None
    if head and work.hides_samples:
        raise ConfigError("dp sample: head_start 'class-mean' is made from samples without noise; 'none'")
    refuse(lora_problems(work, manifest))
    epsilon = epsilon_of_steps([steps_of(work)], DELTA) if work.hides_samples else None
    start = load_peft(Path(adapter), manifest) if adapter else artifact.adapter()
    load = partial(
        load_dataset,
        manifest=manifest,
        folder=artifact.folder,
        seq_len=work.seq_len,
        columns=columns,
        sequences=sequences,
    )
    dataset, held_out = load(data), load(eval) if eval else None
    for cut in (dataset.cut, held_out.cut if held_out else None):
        if cut:
            tell(cut)
    if evaluating.eval_split:
        dataset, held_out = split_off(dataset, evaluating.eval_split, seed=work.seed, source=str(data))
    if sequences.packing:
        num_texts, dataset = dataset.num_samples, packed(dataset, apart=holds_apart(manifest))
        tell(f"packing: {num_texts} texts in {dataset.num_samples} sequences")
        if not holds_apart(manifest):
            tell(NOT_APART)
    with Machine(artifact, resources, folder=folder / CACHE) as machine:
        secret = DiskFiles(folder).secret(NOISE_SECRET, new_secret) if work.hides_samples else b""
        trainer = machine.trainer(
            dataset, work, start, head_start=head_start, class_weights=class_weights, secret=secret
        )
        if machine.fit:
            tell(machine.fit)
        if resume and (folder / CHECKPOINT).exists():
            _go_on(trainer, folder, tell)
        if not trainer.step_index:
            forget_evaluations(folder)
        if head and not trainer.step_index:
            tell(f"{head.weight}: class means of {dataset.num_samples} samples")
            sums = machine.class_sums(dataset, work, start, before_batch=gate.wait)
            trainer.begin_with(class_mean_head(sums, head))
        watch = None
        if held_out:
            judge = partial(
                measure, machine, held_out, manifest=manifest, data=eval or data, before_batch=gate.wait
            )
        if held_out and evaluating.is_watching:
            watch = Watch(
                folder / BEST,
                trainer,
                key=key_of(trainer.origin, held_out.digest),
                every=evaluating.eval_every or dataset.num_batches(work.batch_size),
                patience=evaluating.patience,
                measure=lambda adapter: _kept(judge(adapter, step=trainer.step_index), folder, tell),
                keep=lambda: trainer.save(folder / CHECKPOINT),
                tell=tell,
            )
        was_done = trainer.done or bool(watch and watch.is_over)
        finish(
            trainer,
            folder / CHECKPOINT,
            pace=Pace(checkpoint_every, _CHECKPOINT_EVERY_S if checkpoint_every else 0.0),
            wait=gate.wait,
            is_over=watch.look if watch else lambda: False,
            on_step=on_step,
            tell=tell,
            again="the same command goes on" if resume else "the same command without --no-resume goes on",
        )
        result = _chosen(trainer, watch, manifest, tell) if watch else trainer.adapter
        best_step = watch.best.step if watch and watch.best and watch.has_patience else None
        evaluation = None
        if held_out:
            tell(f"measuring on {held_out.num_samples} held-out samples")
            evaluation = judge(result, step=best_step or trainer.step_index)
            if watch:
                write_evaluation(folder, evaluation)
            else:
                _kept(evaluation, folder, tell)
    save_peft(folder / ADAPTER, manifest, result)
    report = report_of(
        trainer,
        evaluation,
        rows=watch.rows if watch else (),
        best_step=best_step,
        gate=gate,
        memory=machine.memory,
        num_samples=dataset.num_samples,
        adapter=folder / ADAPTER,
        epsilon=epsilon,
    )
    if was_done:
        report = as_measured(report, folder)
    write_run(folder, artifact, arguments, report)
    return report


def _log(note: Pause | Fit | Cut | Evaluated | str) -> None:
    log.log(logging.WARNING if isinstance(note, Cut) else logging.INFO, "%s", note)


def _kept(found: EvaluationFile, folder: Path, tell: Note) -> Evaluated:
    """Keep what was found just now, and tell it."""
    keep_evaluation(folder, found)
    row = found.row()
    tell(row)
    return row


def _chosen(trainer: Trainer, watch: Watch, manifest: Manifest, tell: Note) -> Arrays:
    """The adapter to keep: of the lowest loss where there is patience, else the last."""
    watch.look()
    best = watch.best
    if not (watch.has_patience and best):
        return trainer.adapter
    if watch.is_over and not trainer.done:
        tell(
            f"stopped at step {trainer.step_index} of {trainer.total_steps}: no lower loss since step {best.step}; "
            "more --patience goes on"
        )
    return watch.best_adapter(manifest)


def _make_folder(out: Path, *, resume: bool) -> Path:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise ConfigError(f"{out}: cannot be the output folder: {exc.strerror}") from exc
    if (out / LEDGER).exists():
        raise ConfigError(f"{out}: holds a federation ({LEDGER}); give another output folder")
    if resume and (out / RUN).exists() and not (out / CHECKPOINT).exists():
        raise ConfigError(
            f"{out}: holds a finished run, and no {CHECKPOINT} to go on from; "
            "give another output folder, or resume=False (--no-resume) to replace it"
        )
    return out


def _go_on(trainer: Trainer, folder: Path, tell: Note) -> None:
    trainer.restore(folder / CHECKPOINT, any_length=True)
    if trainer.done:
        tell(f"{folder}: all {trainer.total_steps} steps were taken before; --no-resume trains anew")
    else:
        tell(f"goes on from step {trainer.step_index} of {trainer.total_steps}")
