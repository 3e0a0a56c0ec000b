"""How much memory this process has had."""

import resource
import sys
from pathlib import Path


def peak_rss_mb() -> float:
    """Largest resident memory of this process so far, in 2**20 bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024
    except (OSError, IndexError):
        unit = 1024**2 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit
