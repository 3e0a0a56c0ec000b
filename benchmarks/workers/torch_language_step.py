"""One fresh process that trains a language model with torch + peft, fp32; prints one JSON object.

Usage: torch_language_step.py MODEL BATCH SEQ STEPS THREADS. LoRA is what ``fleetune export`` attaches: r=8, peft's own modules.
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
    """Train, and print the same figures as budget_run."""
    folder, *numbers = sys.argv[1:]
    batch_size, seq_len, steps, threads = map(int, numbers)
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    plain = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    model = peft.get_peft_model(plain, peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16)).eval()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(1000, plain.config.vocab_size, (batch_size, seq_len))
    seconds = []
    for _ in range(steps):
        start = time.perf_counter()
        model(input_ids=ids, attention_mask=torch.ones_like(ids), labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
        if len(seconds) == 1:
            first_done = time.time()
    peak_kb = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    found = {"step_ms": 1e3 * statistics.median(seconds[min(2, steps - 1) :]), "first_done": first_done}
    print(json.dumps({**found, "peak_mb": peak_kb * 1024 / 1e6}))


if __name__ == "__main__":
    main()
