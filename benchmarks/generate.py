"""Text out, greedy: speed, time to the first token and peak memory of the device runtime against transformers' ``generate``.

Interleaved repeats, each in a fresh process with the same number of threads, on the same prompt; ratios are taken pair by pair.
The device runs the model with its LoRA; transformers runs it without (``torch``) and with (``peft``). ``again`` is the device
without its memory of the tokens before; of the large shapes, which are run when they are asked for, it would take an hour.
"""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measuring.figures import Round, chart_of, medians, ratio
from benchmarks.measuring.processes import run_worker
from benchmarks.measuring.subjects import artifact_of, model_of

MODELS = ("stories", "llama")
PROMPT, COUNT, THREADS, REPEATS = 64, 200, 2, 3
_WAYS = (
    ("device", "device_generate", "remember"),
    ("torch", "torch_generate", "plain"),
    ("peft", "torch_generate", "lora"),
    ("again", "device_generate", "again"),
)
"""Who is measured, by which worker, told what."""
Say = Callable[[str], None]


def measure(
    say: Say, *, only: Sequence[str] | None = None, repeats: int = REPEATS, threads: int = THREADS
) -> dict[str, Any]:
    """Figures of every model, fp32, and whether both wrote the same tokens."""
    with tempfile.TemporaryDirectory() as root:
        found = {name: _model(name, Path(root), say, repeats, threads) for name in only or MODELS}
    rows = [{"model": n, "device_over_torch": one["speed_over_torch"]} for n, one in found.items()]
    return {
        "benchmark": "generate",
        "prompt_tokens": PROMPT,
        "tokens": COUNT,
        "threads": threads,
        "repeats": repeats,
        **found,
        "chart": chart_of("model", rows, "device_over_torch"),
    }


def _model(name: str, root: Path, say: Say, repeats: int, threads: int) -> dict[str, Any]:
    model, artifact = model_of(name, root), artifact_of(name, root, say=say)
    written: set[tuple[str, tuple[int, ...]]] = set()
    ways = [way for way in _WAYS if way[0] != "again" or name in MODELS]
    rounds = [_round(ways, (artifact, model), say, threads, written) for _ in range(repeats)]
    texts = {ids for _, ids in written}
    return {
        **medians(rounds),
        "same_tokens": len(texts) == 1,
        "speed_over_torch": ratio(rounds, "device", "torch", what="tokens_per_s"),
        "speed_over_peft": ratio(rounds, "device", "peft", what="tokens_per_s"),
        "speed_over_again": ratio(rounds, "device", "again", what="tokens_per_s"),
        "first_over_torch": ratio(rounds, "device", "torch", what="first_ms"),
        "peak_over_torch": ratio(rounds, "device", "torch", what="peak_mb"),
    }


def _round(
    ways: Sequence[tuple[str, str, str]],
    folders: tuple[Path, Path],
    say: Say,
    threads: int,
    written: set[tuple[str, tuple[int, ...]]],
) -> Round:
    """``folders`` are the artifact and the model."""
    found = {}
    for who, worker, way in ways:
        folder = folders[worker == "torch_generate"]
        figures = run_worker(worker, folder, PROMPT, COUNT, threads, way, threads=threads)
        written.add((who, tuple(figures.pop("ids"))))
        found[who] = figures
    say(", ".join(f"{who} {figures['tokens_per_s']:.1f} tokens/s" for who, figures in found.items()))
    return found
