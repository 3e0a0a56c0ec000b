"""ExecuTorch's own training flow for the same model: the joint graph on portable kernels, as a ``.pte`` file.

Usage: joint_export.py MODEL OUT BATCH SEQ LAYERS, LAYERS = how many blocks are kept, 0 all. The flow is that of
executorch/extension/training: torch.export, _export_forward_backward, to_edge, to_executorch. Sizes are fixed.
"""

import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any

warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch_step import load  # noqa: E402


class WithLoss(torch.nn.Module):
    """The flow wants the loss first among the outputs."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: torch.Tensor, mask: torch.Tensor, labels: torch.Tensor) -> Any:
        """Loss, and logits out of the gradient's sight."""
        logits = self.model(input_ids=ids, attention_mask=mask).logits
        return torch.nn.functional.cross_entropy(logits, labels), logits.detach()


def main() -> None:
    """Export, and print size and seconds."""
    from executorch.exir import to_edge
    from torch.export.experimental import _export_forward_backward

    folder, out, batch_size, seq_len, layers = sys.argv[1:]
    started = time.monotonic()
    shape = (int(batch_size), int(seq_len))
    ids, mask = torch.randint(1000, 20000, shape), torch.ones(shape, dtype=torch.int64)
    example = (ids, mask, torch.randint(0, 77, shape[:1]))
    program = torch.export.export(WithLoss(load(folder, int(layers))), example, strict=False)
    joint = _export_forward_backward(program)
    Path(out).write_bytes(to_edge(joint).to_executorch().buffer)
    print(json.dumps({"export_s": time.monotonic() - started, "file_mb": Path(out).stat().st_size / 2**20}))


if __name__ == "__main__":
    main()
