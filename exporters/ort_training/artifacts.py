"""Runs in the environment of ``onnxruntime-training-cpu``, as a script: forward graphs in, official training artifacts out.

Standard input is JSON: a list of ``{"folder", "forward", "trained"}``; ``forward`` is deleted when its artifacts are written.
"""

import json
import sys
from pathlib import Path

import onnx
from onnxruntime.training import artifacts, onnxblock


def main() -> None:
    """Generate the artifacts of every model asked for."""
    for job in json.load(sys.stdin):
        artifacts.generate_artifacts(
            onnx.load(job["forward"]),
            requires_grad=job["trained"],
            frozen_params=[],
            optimizer=onnxblock.optim.AdamW(eps=1e-8),
            artifact_directory=job["folder"],
        )
        Path(job["forward"]).unlink()


if __name__ == "__main__":
    main()
