"""What Hugging Face says while it works: errors become one line, and warnings become notes, never silence."""

import contextlib
import logging
import re
import warnings
from collections.abc import Callable, Iterator

import transformers

from fleetune.device_runtime.errors import ExportError, one_line, some

Tell = Callable[[str], None]
"""Takes a note: one line, plain words."""

_LOUD = ("transformers", "peft", "huggingface_hub")
_OF_CODE = (DeprecationWarning, PendingDeprecationWarning, FutureWarning, ImportWarning)
"""They concern who calls the library, which is us."""
_SLIPS = (LookupError, TypeError, AttributeError)
"""Their texts say nothing by themselves: the name of a key, a type."""
_MISFIT = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((\[.*?\])\) from checkpoint, "
    r"the shape in current model is torch\.Size\((\[.*?\])\)"
)
_SHOWN = 3
_CHECKED = (
    "LOAD REPORT",  # models.fresh_parameters, models.left_out
    "Found missing adapter keys",  # lora.load_adapter compares names and values
    "incompatible to the `id2label` map",  # models tells of a head for other classes
    "is_decoder=True",  # lookups.sees_ahead
    "fan_in_fan_out is set to",  # peft mends it by itself; the golden step has the result
)
"""What is checked by ourselves, where the comment says, and so is told in our words or refused."""


@contextlib.contextmanager
def told_shortly(what: str) -> Iterator[None]:
    """Hugging Face's many errors as one line of ours."""
    try:
        yield
    except ExportError:
        raise
    except Exception as exc:
        raise ExportError(f"{what}: {in_short(exc)}") from exc


def in_short(exc: Exception) -> str:
    """What a library's error says, in one line; a slip of the library itself by its kind, tensors that do not fit by shape."""
    if misfits := _MISFIT.findall(str(exc)):
        told_of = [f"{name} is {there}, expected {here}" for name, there, here in misfits]
        return some(told_of, at_most=_SHOWN, by="; ")
    lines = [line.strip() for line in str(exc).strip().splitlines() if line.strip()]
    told = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(exc).__name__} {told}".strip() if isinstance(exc, _SLIPS) or not told else told


@contextlib.contextmanager
def listening(tell: Tell) -> Iterator[None]:
    """Give ``tell`` one line for each thing that is logged or warned of meanwhile, unless it is checked by ourselves.

    No bars are shown. Of an error nothing is told beside it.
    """
    lines: list[str] = []
    transformers.logging.disable_progress_bar()
    with contextlib.ExitStack() as stack:
        for name in _LOUD:
            stack.enter_context(_heard(logging.getLogger(name), lines))
        caught = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        yield
    lines += [str(w.message) for w in caught if not issubclass(w.category, _OF_CODE)]
    for line in dict.fromkeys(lines):
        if not any(known in line for known in _CHECKED):
            tell(one_line(" ".join(line.split()), length_max=300))


@contextlib.contextmanager
def _heard(logger: logging.Logger, lines: list[str]) -> Iterator[None]:
    """For the duration, what ``logger`` and those below it warn of is appended to ``lines`` and goes nowhere else."""
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = [_Ear(lines)], False
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before[:2]
        logger.setLevel(before[2])


class _Ear(logging.Handler):
    def __init__(self, lines: list[str]) -> None:
        super().__init__(logging.WARNING)
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        self._lines.append(record.getMessage())
