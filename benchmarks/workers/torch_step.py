"""One fresh process that trains the same model with torch + peft, eager; prints one JSON object.

Usage: torch_step.py MODEL BATCH SEQ STEPS THREADS. Dropout is off, as on the device: both do the same arithmetic.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402


def main() -> None:
    """Train, and print the same figures as device_step."""
    folder, batch_size, seq_len, steps, threads = sys.argv[1:]
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(int(threads))
    settings = {"num_labels": 77, "attn_implementation": "eager"}
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(folder, **settings)
    lora = peft.LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model = peft.get_peft_model(plain, lora).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    shape = (int(batch_size), int(seq_len))
    batch = {
        "input_ids": torch.randint(1000, 20000, shape),
        "attention_mask": torch.ones(shape, dtype=torch.int64),
    }
    labels = torch.randint(0, 77, shape[:1])
    seconds = []
    for _ in range(int(steps)):
        start = time.perf_counter()
        loss = model(**batch, labels=labels).loss
        loss.backward()
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


if __name__ == "__main__":
    main()
