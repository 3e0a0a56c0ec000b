"""Writes stories260K, a small Llama that lies beside the checkout, as a transformers folder; prints one JSON object.

Usage: make_stories.py OUT. Fails where the checkpoint is not in ../shared/models.
"""

import json
import sys
import warnings
from pathlib import Path

warnings.simplefilter("ignore")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "support"))

from stories import MODEL, stories_folder  # noqa: E402


def main() -> None:
    """Make it."""
    if not MODEL.is_dir():
        raise SystemExit("there is no shared/models/stories260K beside the checkout")
    print(json.dumps({"folder": str(stories_folder(Path(sys.argv[1])))}))


if __name__ == "__main__":
    main()
