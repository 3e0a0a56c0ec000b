"""How much work something is, in instructions of the interpreter: the same on every machine. Loops in C are not seen."""

import sys
from typing import Any


class Steps:
    """Counts while its block runs; ``number`` is there afterwards."""

    def __init__(self) -> None:
        self.number = 0

    def __enter__(self) -> "Steps":
        self._before = sys.gettrace()
        sys.settrace(self._trace)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(self._before)

    def _trace(self, frame: Any, event: str, _: object) -> Any:
        frame.f_trace_opcodes = True
        self.number += event == "opcode"
        return self._trace
