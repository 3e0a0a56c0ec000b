"""Types that msgspec reads into, prepared by one thread at a time.

The first time that msgspec sees a struct, a dataclass or a named tuple it puts what it finds on the class before it is whole: a
second thread that reads the same type at that moment ends the interpreter (msgspec 0.18 to 0.21; ``tests/test_prepared.py`` shows
it). So every type that is read into goes through here, where the first look is locked.
"""

import threading
from contextlib import suppress
from typing import Any, TypeVar

import msgspec

T = TypeVar("T")
_lock = threading.Lock()
_seen: set[Any] = set()


def prepared(kind: T) -> T:
    """Return a type that msgspec knows whole, whichever thread asks first."""
    if not _is_seen(kind):
        with _lock:
            msgspec.json.Decoder(kind)
        with suppress(TypeError):
            _seen.add(kind)
    return kind


def _is_seen(kind: object) -> bool:
    """Whether it was prepared before; a type whose metadata has no hash cannot be remembered."""
    try:
        return kind in _seen
    except TypeError:
        return False
