"""Freed memory that a process keeps, up to a bound: for each update an aggregator takes some MB and frees them again.

The C library would give them back to the system each time, and have each page zeroed and found anew: of 100 devices that was
a twelfth of the aggregator's processor time (docs/scale.md).
"""

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
"""Of mallopt(3), as in malloc.h."""
KEPT_BYTES = 32 * 1024 * 1024
"""Freed memory at the end of the heap that is not given back."""
_SETTINGS = {_TRIM_THRESHOLD: KEPT_BYTES, _TOP_PAD: 1024 * 1024, _MMAP_THRESHOLD: 4 * 1024 * 1024}
"""What is larger than the last lies by itself, and goes back at once."""


def keep_freed() -> bool:
    """Have this process keep some of what it frees; False where it cannot be had, or who started it has set something of it.

    It is of the whole process: for commands, not for libraries.
    """
    if any(name.startswith("MALLOC_") for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, TypeError, AttributeError):  # of another C library, another system
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
