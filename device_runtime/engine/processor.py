"""Which instructions of this processor onnxruntime's int8 products use."""

import re
from pathlib import Path

OTHER = "other"
_PATHS = {
    "avx512_vnni": "avx512-vnni",
    "avx_vnni": "avx-vnni",
    "avx512bw": "avx512",
    "avx2": "avx2",
    "i8mm": "neon-i8mm",
    "asimddp": "neon-dotprod",
}
"""By the kernel's word for them, the best of each architecture first."""
_WORDS = re.compile(r"^(?:flags|Features)[ \t]*:(.*)$", re.MULTILINE)


def int8_path(root: Path | str = "/") -> str:
    """Name the best instructions for int8 listed in ``proc/cpuinfo`` below ``root``; ``other`` if none, or no such file."""
    try:
        found = _WORDS.search((Path(root) / "proc/cpuinfo").read_text(errors="replace"))
    except OSError:
        return OTHER
    words = found[1].split() if found else []
    return next((path for word, path in _PATHS.items() if word in words), OTHER)
