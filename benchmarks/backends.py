"""A training step of MiniLM and of a 12-layer BERT, batch 8 x 128, full and half depth, on every backend and in torch.

Every figure is the median over interleaved repeats, each a fresh process; ratios are taken pair by pair within a repeat. AdamW is
part of a step everywhere but in ``joint``, whose runtime has SGD. ``joint`` is ExecuTorch's own training flow on portable
kernels: all layers of MiniLM, but one layer of the BERT, which ``torch-layer`` runs as well to compare it with.
A contender that does not run has a ``reason`` in the place of figures.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from device_runtime.errors import FleetuneError
from device_runtime.tables import Table
from exporters.ort_training import training_python
from toolkit.benchmark import run_floor, run_worker
from toolkit.export import export
from toolkit.figures import Round, medians, ratio, table
from toolkit.models import packaged_model

BATCH, SEQ, THREADS, REPEATS, LIMIT_S = 8, 128, 2, 3, 300
Say = Callable[[str], None]


class Model(NamedTuple):
    """``shape`` is layers, width, inner width and heads; ``joint_layers`` how many of its layers ``joint`` runs, 0 all."""

    shape: tuple[int, int, int, int]
    steps: int
    joint_layers: int


class Place(NamedTuple):
    """What is measured: ``active`` of the model's layers, in ``folder`` whatever was made for it."""

    model: Model
    source: Path
    folder: Path
    active: int
    threads: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Batch, sequence, steps and threads."""
        return BATCH, SEQ, self.model.steps, self.threads

    @property
    def is_full(self) -> bool:
        """Whether no layer is left out."""
        return self.active == self.model.shape[0]


class Contender(NamedTuple):
    """``prepare(place)`` is called once a model with full depth, ``run(place)`` once a repeat and depth."""

    run: Callable[[Place], dict[str, float]]
    prepare: Callable[[Place], object] = lambda place: None
    full_only: bool = False


def measure(
    say: Say, *, only: Sequence[str] = (), repeats: int = REPEATS, threads: int = THREADS
) -> dict[str, Any]:
    """Step time and peak memory of each contender, and their ratios to torch and to the floor.

    ``only`` names contenders, models or both; of which none is named, all are measured.
    """
    chosen = {name: CONTENDERS[name] for name in only if name not in MODELS} or CONTENDERS
    models = [name for name in MODELS if name in only] or list(MODELS)
    reasons: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as root:
        places = [p for name in models for p in _places(name, Path(root) / name, threads)]
        for name, place in places:
            if place.is_full:
                _prepare(name, place, chosen, reasons, say)
        rounds = [_round(places, chosen, reasons, say) for _ in range(repeats)]
    figures = _figures(rounds, [name for name, _ in places])
    for line in table(_rows(figures, [name for name, _ in places], chosen)):
        say(line)
    settings = {"batch": [BATCH, SEQ], "threads": threads, "repeats": repeats}
    return {"benchmark": "backends", **settings, **figures, **{f"{n}_reason": r for n, r in reasons.items()}}


def _places(name: str, folder: Path, threads: int) -> Iterator[tuple[str, Place]]:
    model = MODELS[name]
    folder.mkdir()
    source = packaged_model() if name == "minilm" else folder / "model"
    if name != "minilm":
        run_worker("make_bert", source, threads=threads)
    for depth, active in (("full", model.shape[0]), ("half", model.shape[0] // 2)):
        yield f"{name}_{depth}", Place(model, source, folder, active, threads)


def _prepare(
    name: str, place: Place, chosen: dict[str, Contender], reasons: dict[str, str], say: Say
) -> None:
    for who, contender in chosen.items():
        say(f"preparing {who} for {name.removesuffix('_full')}")
        try:
            contender.prepare(place)
        except FleetuneError as exc:
            say(f"{who} cannot be prepared: {exc}")
            for depth in ("full", "half"):
                reasons[f"{name.removesuffix('full')}{depth}_{who}"] = str(exc)


def _round(
    places: list[tuple[str, Place]], chosen: dict[str, Contender], reasons: dict[str, str], say: Say
) -> Round:
    """Everybody who can, one after the other."""
    found: Round = {}
    for name, place in places:
        for who, contender in chosen.items():
            key = f"{name}_{who}"
            if key in reasons or (contender.full_only and not place.is_full):
                continue
            try:
                found[key] = contender.run(place)
            except FleetuneError as exc:
                reasons[key] = str(exc)
            say(f"{key}: {found[key]['step_ms']:.0f} ms" if key in found else f"{key}: {reasons[key]}")
    return found


def _figures(rounds: list[Round], names: list[str]) -> dict[str, Any]:
    figures: dict[str, Any] = medians(rounds, digits=1)
    pairs = {
        f"{name}_{who}_over_{other}": ratio(rounds, f"{name}_{who}", f"{name}_{other}")
        for name in names
        for who in CONTENDERS
        for other in ("torch", "floor")
        if who != other
    }
    pairs |= {
        f"{name}_joint_over_torch-layer": ratio(rounds, f"{name}_joint", f"{name}_torch-layer")
        for name in names
    }
    pairs |= {
        f"{name}_{who}_peak_over_torch": ratio(rounds, f"{name}_{who}", f"{name}_torch", what="peak_mb")
        for name in names
        for who in CONTENDERS
    }
    return figures | {name: value for name, value in pairs.items() if value is not None}


def _rows(
    figures: dict[str, Any], names: list[str], chosen: dict[str, Contender]
) -> Iterator[dict[str, Any]]:
    wanted = ("step_ms", "over_torch", "over_floor", "peak_mb", "peak_over_torch")
    for name in names:
        for who in chosen:
            key = f"{name}_{who}"
            if f"{key}_step_ms" in figures:
                yield {"": f"{name} {who}", **{what: figures.get(f"{key}_{what}") for what in wanted}}


def _floor(place: Place) -> dict[str, float]:
    return run_floor(place.active, *place.model.shape[1:], *place.sizes[:3], threads=place.threads)


def _torch(place: Place, *, layers: int = 0, cache: Path | str = "") -> dict[str, float]:
    words = (place.source, *place.sizes, layers or place.active, cache)
    return run_worker("torch_step", *words, threads=place.threads, limit_s=LIMIT_S)


def _one_layer(place: Place) -> dict[str, float]:
    return _torch(place, layers=1)


def _compiled(place: Place) -> dict[str, float]:
    return _torch(place, cache=place.folder / "inductor")


def _device(name: str) -> Callable[[Place], dict[str, float]]:
    def run(place: Place) -> dict[str, float]:
        mode = "full" if place.is_full else "half"
        python = {"python": training_python()} if name == "ort-training" else {}
        words = (place.folder / name, *place.sizes, mode)
        return run_worker("device_step", *words, threads=place.threads, limit_s=LIMIT_S, **python)

    return run


def _export(name: str, *, backend: str = "onnx", base_dtype: str = "fp32") -> Callable[[Place], object]:
    def prepare(place: Place) -> object:
        return export(
            place.source,
            task="sequence-classification",
            num_labels=77,
            backend=backend,
            base_dtype=base_dtype,
            out=place.folder / name,
            on_progress=lambda line: None,
        )

    return prepare


def _ort_export(place: Place) -> object:
    training_python()
    layers = place.model.shape[0]
    words = (place.source, place.folder / "ort-training", f"{layers // 2},{layers}")
    return run_worker("ort_export", *words, threads=place.threads, limit_s=LIMIT_S)


def _joint_export(place: Place) -> object:
    words = (place.source, place.folder / "joint.pte", BATCH, SEQ, place.model.joint_layers)
    return run_worker("joint_export", *words, threads=place.threads, limit_s=LIMIT_S)


def _joint(place: Place) -> dict[str, float]:
    words = (place.folder / "joint.pte", BATCH, SEQ, 2, place.threads)
    return run_worker("joint_step", *words, threads=place.threads, limit_s=LIMIT_S)


MODELS = Table("model", {"minilm": Model((6, 384, 1536, 12), 8, 0), "bert": Model((12, 768, 3072, 12), 5, 1)})
CONTENDERS = Table(
    "contender",
    {
        "floor": Contender(_floor),
        "torch": Contender(_torch),
        "compile": Contender(_compiled),
        "onnx": Contender(_device("onnx"), _export("onnx")),
        "int8": Contender(_device("int8"), _export("int8", base_dtype="int8")),
        "executorch": Contender(_device("executorch"), _export("executorch", backend="executorch")),
        "ort-training": Contender(_device("ort-training"), _ort_export),
        "joint": Contender(_joint, _joint_export, full_only=True),
        "torch-layer": Contender(_one_layer, full_only=True),
    },
)
