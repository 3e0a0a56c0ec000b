"""The words that the tiny artifact's tokenizer knows, and lines of them."""

from pathlib import Path

import numpy as np

GROUPS = ("red green blue grey", "cat dog cow hen", "saw nail glue drill")


def write_lines(path: Path, *, seed: int = 0, groups: tuple[int, ...] = (0, 1, 2)) -> Path:
    """120 lines of one to eight words from one of the groups, labelled ``a``, ``b`` or ``c`` by it, as CSV."""
    rng = np.random.default_rng(seed)
    lines = ["text,label"]
    for group in rng.choice(groups, 120):
        words = rng.choice(GROUPS[group].split(), rng.integers(1, 9))
        lines.append(f"{' '.join(words)},{'abc'[group]}")
    path.write_text("\n".join(lines) + "\n")
    return path
