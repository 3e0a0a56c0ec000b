"""How much of a mapped file is in memory (Linux)."""

import re
from pathlib import Path

from torch import Tensor


def resident_kb(tensor: Tensor) -> int:
    """What is in memory of the file that a tensor lies in."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        start, end = (int(word, 16) for word in entry.split(None, 1)[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return int(re.findall(r"^Rss: +(\d+)", entry, re.MULTILINE)[0])
    raise AssertionError("no such memory")
