"""Work beside a test in a thread that dies with the process: what waits for ever fails one test, and keeps none from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future


def begin(work: Callable, /, *arguments, **options) -> Future:
    """As ``submit`` of a ThreadPoolExecutor, whose end is not waited for."""
    outcome: Future = Future()

    def run() -> None:
        try:
            outcome.set_result(work(*arguments, **options))
        except BaseException as exc:  # noqa: BLE001 (whoever asks for the result has it raised)
            outcome.set_exception(exc)

    threading.Thread(target=run, daemon=True).start()
    return outcome
