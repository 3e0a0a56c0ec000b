"""Several parts of a federation in one process, so that none waits for ever for another that failed."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any


def together(*parts: Callable[[], Any]) -> list[Any]:
    """Call functions at once, each in a thread of its own, and return what they return, in their order.

    As soon as one raises, its error is raised here. The others are not waited for: they end with the process.

    Args:
        parts: functions without arguments, such as ``partial(aggregate, "artifact", …)`` and ``partial(device, "artifact", …)``.
    """
    ended: SimpleQueue[tuple[int, Any, BaseException | None]] = SimpleQueue()

    def run(place: int) -> None:
        try:
            ended.put((place, parts[place](), None))
        except BaseException as exc:  # noqa: BLE001 (it is raised again, where the caller is)
            ended.put((place, None, exc))

    for place in range(len(parts)):
        threading.Thread(target=run, args=(place,), name=f"part {place}", daemon=True).start()
    results: dict[int, Any] = {}
    while len(results) < len(parts):
        place, result, error = ended.get()
        if error:
            raise error
        results[place] = result
    return [results[place] for place in range(len(parts))]
