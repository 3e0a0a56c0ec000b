"""A training step of MiniLM and of a 12-layer BERT, batch 8 x 128, full and half depth, on every backend and in torch.

Every figure is the median over interleaved repeats, each a fresh process; ratios are taken pair by pair within a repeat. AdamW is
part of a step everywhere but in ExecuTorch's own training flow on portable kernels, which has SGD: ``joint`` is that flow on the
whole of MiniLM, ``joint-layer`` on one layer of the BERT, beside ``torch-layer``, torch on one layer. These and ``compile`` are
slow, or slow to start: they run in the first repeat only. A contender that does not run has a ``reason`` in the place of figures.
"""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.measuring.figures import Round, medians, ratio, table
from benchmarks.measuring.processes import run_floor, run_worker
from benchmarks.measuring.subjects import NUM_LABELS, model_of
from fleetune.device_runtime.errors import FleetuneError
from fleetune.device_runtime.tables import Table
from fleetune.exporters.ort_training.writing import training_python
from fleetune.toolkit.export import export

BATCH, SEQ, THREADS, REPEATS, FLOOR_STEPS, JOINT_STEPS, LIMIT_S = 8, 128, 2, 3, 3, 2, 300
Say = Callable[[str], None]


class Model(NamedTuple):
    """``shape`` is layers, width, inner width and heads."""

    shape: tuple[int, int, int, int]
    steps: int


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
    """``prepare(place)`` is called once a model with full depth, ``run(place)`` once a repeat and depth.

    Attributes:
        places: where it is measured; everywhere if empty.
        once: it runs in the first repeat only.
        beside: the one whose step and peak its own are divided by.
    """

    run: Callable[[Place], dict[str, float]]
    prepare: Callable[[Place], object] = lambda place: None
    places: tuple[str, ...] = ()
    once: bool = False
    beside: str = "torch"

    def is_at(self, name: str) -> bool:
        """Whether it is measured at the place of that name."""
        return not self.places or name in self.places


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
        rounds = [
            _round(places, {w: c for w, c in chosen.items() if not (i and c.once)}, reasons, say)
            for i in range(repeats)
        ]
    figures = _figures(rounds, [name for name, _ in places])
    for line in table(_rows(figures, [name for name, _ in places], chosen)):
        say(line)
    settings = {"batch": [BATCH, SEQ], "threads": threads, "repeats": repeats}
    return {"benchmark": "backends", **settings, **figures, **{f"{n}_reason": r for n, r in reasons.items()}}


def _places(name: str, folder: Path, threads: int) -> Iterator[tuple[str, Place]]:
    model = MODELS[name]
    folder.mkdir()
    source = model_of(name, folder)
    for depth, active in (("full", model.shape[0]), ("half", model.shape[0] // 2)):
        yield f"{name}_{depth}", Place(model, source, folder, active, threads)


def _prepare(
    name: str, place: Place, chosen: dict[str, Contender], reasons: dict[str, str], say: Say
) -> None:
    for who, contender in chosen.items():
        if not contender.is_at(name):
            continue
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
            if key in reasons or not contender.is_at(name):
                continue
            try:
                found[key] = contender.run(place)
            except FleetuneError as exc:
                reasons[key] = str(exc)
            say(f"{key}: {found[key]['step_ms']:.0f} ms" if key in found else f"{key}: {reasons[key]}")
    return found


def _figures(rounds: list[Round], names: list[str]) -> dict[str, Any]:
    """Medians, ``_over_torch`` (or over who else is beside), ``_peak_over_torch`` and ``_over_floor``."""
    pairs: dict[str, float | None] = {}
    for name in names:
        for who, contender in CONTENDERS.items():
            key, beside, floor = f"{name}_{who}", f"{name}_{contender.beside}", f"{name}_floor"
            pairs[f"{key}_over_{contender.beside}"] = ratio(rounds, key, beside)
            pairs[f"{key}_peak_over_{contender.beside}"] = ratio(rounds, key, beside, what="peak_mb")
            if contender.beside == "torch":
                pairs[f"{key}_over_floor"] = ratio(rounds, key, floor)
    return {**medians(rounds, digits=1), **{n: value for n, value in pairs.items() if value is not None}}


def _rows(
    figures: dict[str, Any], names: list[str], chosen: dict[str, Contender]
) -> Iterator[dict[str, Any]]:
    for name in names:
        for who, contender in chosen.items():
            key = f"{name}_{who}"
            if f"{key}_step_ms" in figures:
                yield {
                    "": f"{name} {who}",
                    "step_ms": figures[f"{key}_step_ms"],
                    "over_torch": figures.get(f"{key}_over_{contender.beside}"),
                    "over_floor": figures.get(f"{key}_over_floor"),
                    "peak_mb": figures.get(f"{key}_peak_mb"),
                    "peak_over_torch": figures.get(f"{key}_peak_over_{contender.beside}"),
                }


def _floor(place: Place) -> dict[str, float]:
    return run_floor(place.active, *place.model.shape[1:], BATCH, SEQ, FLOOR_STEPS, threads=place.threads)


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
            num_labels=NUM_LABELS,
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


def _joint_export(layers: int) -> Callable[[Place], object]:
    def prepare(place: Place) -> object:
        words = (place.source, place.folder / "joint.pte", BATCH, SEQ, layers)
        return run_worker("joint_export", *words, threads=place.threads, limit_s=LIMIT_S)

    return prepare


def _joint(place: Place) -> dict[str, float]:
    words = (place.folder / "joint.pte", BATCH, SEQ, JOINT_STEPS, place.threads)
    return run_worker("joint_step", *words, threads=place.threads, limit_s=LIMIT_S)


MODELS = Table("model", {"minilm": Model((6, 384, 1536, 12), 7), "bert": Model((12, 768, 3072, 12), 5)})
CONTENDERS = Table(
    "contender",
    {
        "floor": Contender(_floor),
        "torch": Contender(_torch),
        "compile": Contender(_compiled, once=True),
        "onnx": Contender(_device("onnx"), _export("onnx")),
        "int8": Contender(_device("int8"), _export("int8", base_dtype="int8")),
        "executorch": Contender(_device("executorch"), _export("executorch", backend="executorch")),
        "ort-training": Contender(_device("ort-training"), _ort_export),
        "joint": Contender(_joint, _joint_export(0), places=("minilm_full",), once=True),
        "torch-layer": Contender(_one_layer, places=("bert_full",), once=True, beside="torch-layer"),
        "joint-layer": Contender(
            _joint, _joint_export(1), places=("bert_full",), once=True, beside="torch-layer"
        ),
    },
)
