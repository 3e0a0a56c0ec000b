"""One fresh process that runs ExecuTorch's own joint graph by its training module; prints one JSON object.

Usage: joint_step.py FILE BATCH SEQ STEPS THREADS. The step ends with its SGD, there is no AdamW.
"""

import json
import statistics
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

import torch  # noqa: E402
from executorch.extension.pybindings import portable_lib  # noqa: E402
from executorch.extension.training import (  # noqa: E402
    _load_for_executorch_for_training,
    get_sgd_optimizer,
)


def main() -> None:
    """Train, and print the same figures as device_step."""
    file, batch_size, seq_len, steps, threads = sys.argv[1:]
    portable_lib._unsafe_reset_threadpool(int(threads))
    torch.set_num_threads(int(threads))
    module = _load_for_executorch_for_training(file)
    shape = (int(batch_size), int(seq_len))
    ids, mask = torch.randint(1000, 20000, shape), torch.ones(shape, dtype=torch.int64)
    given = (ids, mask, torch.randint(0, 77, shape[:1]))
    seconds, losses = [], []
    for _ in range(int(steps)):
        start = time.perf_counter()
        losses.append(float(module.forward_backward("forward", given)[0]))
        get_sgd_optimizer(module.named_parameters(), 0.1, 0, 0, 0, False).step(module.named_gradients())
        seconds.append(time.perf_counter() - start)
    peak = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1024
    figures = {"step_ms": 1e3 * statistics.median(seconds), "peak_mb": peak}
    print(json.dumps({**figures, "loss_first": losses[0], "loss_last": losses[-1]}))


if __name__ == "__main__":
    main()
