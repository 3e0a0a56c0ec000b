"""Exports for ONNX Runtime Training the depths that are going to be measured, and no others; prints one JSON object.

Usage: ort_export.py MODEL OUT DEPTHS, DEPTHS = numbers with commas between them. `fleetune export` makes every depth.
"""

import json
import sys
import time
import warnings
from pathlib import Path

warnings.simplefilter("ignore")

from fleetune.exporters.ort_training.writing import write_ort_training  # noqa: E402
from fleetune.exporters.writing import Description  # noqa: E402
from fleetune.toolkit.export import read_labels  # noqa: E402
from fleetune.toolkit.lora import attach_lora  # noqa: E402
from fleetune.toolkit.models import load_model  # noqa: E402
from fleetune.toolkit.programs import describe, program_of  # noqa: E402

TASK = "sequence-classification"


def main() -> None:
    """Export, and print the seconds it took."""
    source, out, depths = sys.argv[1:]
    started, labels = time.monotonic(), read_labels(None, 77)
    plain, tokenizer = load_model(source, task=TASK, labels=labels)
    learning = attach_lora(plain, task=TASK, r=8, alpha=16, target_modules=None)
    loaded = describe(learning, tokenizer, task=TASK, source=source)
    description = Description(Path(source).name, loaded.architecture, TASK, tuple(labels), loaded.peft_config)
    wanted = [int(depth) for depth in depths.split(",")]
    write_ort_training(program_of(loaded, task=TASK), description, Path(out), depths=wanted)
    print(json.dumps({"export_s": time.monotonic() - started}))


if __name__ == "__main__":
    main()
