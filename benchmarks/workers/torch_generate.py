"""One fresh process that writes greedily with transformers' ``generate``; prints one JSON object.

Usage: torch_generate.py MODEL PROMPT COUNT THREADS WITH. WITH is ``plain``, or ``lora`` for the model with a fresh LoRA r=8 on
query and value, which is what the device runs. Attention and cache are transformers' own choice.
"""

import json
import sys
import time
import warnings
from typing import Any

warnings.simplefilter("ignore")

import peft  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from device_generate import WARM, figures, prompt_of  # noqa: E402
from transformers.generation.streamers import BaseStreamer  # noqa: E402


class _Times(BaseStreamer):
    """When each token came; the prompt comes first."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take a token, or the prompt."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is held back."""


def main() -> None:
    """Write, and print the same figures as device_generate."""
    folder, prompt, count, threads, way = sys.argv[1:]
    torch.set_num_threads(int(threads))
    transformers.logging.set_verbosity_error()
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    if way == "lora":
        lora = peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"])
        model = peft.get_peft_model(model, lora).eval()
    given = prompt_of(int(prompt), model.config.vocab_size)
    _write(model, given, WARM)
    print(json.dumps(figures(*_write(model, given, int(count)))))


def _write(model: Any, prompt: list[int], count: int) -> tuple[list[float], list[int]]:
    ids, seen = torch.tensor([prompt]), _Times()
    settings = {"do_sample": False, "max_new_tokens": count, "pad_token_id": 0}
    started = time.perf_counter()
    with torch.no_grad():
        found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), streamer=seen, **settings)
    return [started, *seen.times[1:]], found[0, len(prompt) :].tolist()


if __name__ == "__main__":
    main()
