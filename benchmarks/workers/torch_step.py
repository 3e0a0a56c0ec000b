"""One fresh process that trains the same model with torch + peft; prints one JSON object.

Usage: torch_step.py MODEL BATCH SEQ STEPS THREADS [LAYERS CACHE]. Dropout is off, as on the device, so that both do the same
arithmetic. LAYERS keeps that many of the model's blocks in their list, 0 all. With CACHE, a folder for what the compiler makes,
the step runs under ``torch.compile``; it may be empty.
"""

import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    """Train, and print the same figures as device_step."""
    folder, batch_size, seq_len, steps, threads = sys.argv[1:6]
    layers, cache = sys.argv[6:] or ("0", "")
    torch.set_num_threads(int(threads))
    model = load(folder, int(layers))
    run = compiled(model, cache) if cache else model
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    shape = (int(batch_size), int(seq_len))
    batch = {
        "input_ids": torch.randint(1000, 20000, shape),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
        "labels": torch.randint(0, 77, shape[:1]),
    }
    seconds = []
    for _ in range(int(steps)):
        start = time.perf_counter()
        run(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            first_done = time.time()
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    print(
        json.dumps(
            {"step_ms": 1e3 * statistics.median(seconds[2:]), "first_done": first_done, "peak_mb": peak}
        )
    )


def load(folder: str, layers: int) -> Any:
    """The model with LoRA r=8 on query and value, evaluation mode, ``layers`` blocks (0: all)."""
    transformers.logging.set_verbosity_error()
    settings = {"num_labels": 77, "attn_implementation": "eager"}
    settings |= {"num_hidden_layers": layers} if layers else {}
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    return peft.get_peft_model(plain, lora).eval()


def compiled(model: Any, cache: str) -> Any:
    """The model under ``torch.compile`` for one fixed shape; a later process finds its kernels in ``cache``."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    return torch.compile(model, dynamic=False)


if __name__ == "__main__":
    main()
