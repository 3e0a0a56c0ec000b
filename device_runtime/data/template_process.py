"""The process that a chat template runs in: it has this file, jinja2, and nothing else of the machine.

A template comes from whoever made the artifact. Jinja's sandbox keeps it from Python's inside; the limits of this process keep
what the sandbox does not: loops without end, strings of gigabytes, files, sockets, programs. Requests and answers are lines of
JSON. Only this imports jinja2; it imports nothing of ours, and is started as a script by ``chat``.

Source: what a template is given, and ``generation``, are those of transformers (utils/chat_template_utils.py).
"""

import json
import math
import sys
from datetime import date
from typing import Any, NoReturn

MEMORY_BYTES = 256 * 1024**2
"""Of the process, Python's own 20 MB among it."""
TEXT_MAX = 8 * 1024**2
"""Characters of a rendered chat."""
TODAY = date(2024, 7, 26)
"""Of ``strftime_now``: the day that Llama's template names where there is no clock. The same data stays the same text."""
REFUSED, FAILED = "refused", "failed"
"""Who must act: the template raised an exception of its own, so the row is wrong; or it does not work."""
_SAID_MAX = 400
_RANDOM = ("random",)
_GLOBALS = ("lipsum", "cycler", "joiner")
"""What no template of transformers is given by name and may cost much, or is drawn."""


def serve(requests: Any, answers: Any) -> None:
    """Answer lines until there are no more: the first is the template with its variables, each other one a chat.

    ``{"template": …, "variables": {…}, "cpu_s": …}``, then ``{"messages": […], "add_generation_prompt": …}``, with
    ``"tools": […]`` of a chat that has them. An answer is ``{"text": …, "spans": [[start, end], …]}`` in characters, or
    ``{"error": refused or failed, "said": …}``.
    """
    environment = _environment()
    _lock()
    template, variables, cpu_s = None, {}, 1
    for line in requests:
        asked = json.loads(line)
        cpu_s = asked.pop("cpu_s", cpu_s)
        _allow_time(cpu_s)
        try:
            if template is None:
                template, variables = environment.from_string(asked["template"]), asked["variables"]
                found: dict[str, Any] = {"text": "", "spans": []}
            else:
                found = _rendered(template, {**variables, **asked}, environment)
        except MemoryError:
            found = {"error": FAILED, "said": f"more than {MEMORY_BYTES >> 20} MB of memory"}
        except Exception as exc:  # noqa: BLE001 - a stranger's template raises what it likes
            found = _said(exc)
        answers.write(json.dumps(found) + "\n")
        answers.flush()


def _rendered(template: Any, given: dict[str, Any], environment: Any) -> dict[str, Any]:
    pieces: list[str] = []
    size = 0
    environment.spans, environment.pieces = [], pieces
    for piece in template.generate(**given):
        pieces.append(piece)
        size += len(piece)
        if size > TEXT_MAX:
            return {"error": FAILED, "said": f"it writes more than {TEXT_MAX >> 20} MB of one chat"}
    return {"text": "".join(pieces), "spans": environment.spans}


def _environment() -> Any:
    """Jinja as transformers sets it up; what is loaded late is loaded here, for later no file can be opened."""
    import jinja2
    import jinja2.debug
    import jinja2.ext
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(jinja2.ext.Extension):
        """``{% generation %}…{% endgeneration %}`` around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012 - jinja's own form

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
            return jinja2.nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

        def _note(self, caller: Any) -> Any:
            said = caller()
            start = len("".join(found.pieces))
            found.spans.append((start, start + len(said)))
            return said

    class Namespace(jinja2.utils.Namespace):
        """One without names that begin with an underscore."""

        def __init__(*args: Any, **kwargs: Any) -> None:
            self, rest = args[0], args[1:]
            attributes = dict(*rest, **kwargs)
            for name in attributes:
                _check_name(name)
            jinja2.utils.Namespace.__init__(self, attributes)

        def __setitem__(self, name: str, value: Any) -> None:
            _check_name(name)
            jinja2.utils.Namespace.__setitem__(self, name, value)

    def _check_name(name: object) -> None:
        if isinstance(name, str) and name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a namespace takes no name like {name!r}")

    found: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    for name in _RANDOM:
        del found.filters[name]
    for name in _GLOBALS:
        del found.globals[name]
    found.filters["tojson"] = _to_json
    found.globals |= {
        "raise_exception": _raise,
        "strftime_now": TODAY.strftime,
        "dict": _Dictionaries(),
        "namespace": Namespace,
    }
    found.spans, found.pieces = [], []
    found.from_string(
        "{% for a in [1] %}{{ a | tojson }}{{ '\\n' }}{% endfor %}"
    ).render()  # finds the codec of \\n
    return found


class _Refusal(Exception):
    """Raised by a template, of the messages that it was given."""


def _raise(message: object) -> NoReturn:
    raise _Refusal(str(message))


class _Dictionaries:
    """``dict`` without the type itself."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, *args: Any) -> dict[Any, Any]:
        return dict.fromkeys(*args)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: Any = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _said(exc: Exception) -> dict[str, Any]:
    if isinstance(exc, _Refusal):
        return {"error": REFUSED, "said": str(exc)[:_SAID_MAX]}
    line = getattr(exc, "lineno", None) or _line_of(exc)
    place = f" (line {line} of the template)" if line else ""
    return {"error": FAILED, "said": f"{type(exc).__name__}: {exc}"[:_SAID_MAX] + place}


def _line_of(exc: Exception) -> int:
    """Line of the template that it was raised in; 0 where that is not known."""
    found, at = 0, exc.__traceback__
    while at is not None:
        if at.tb_frame.f_code.co_filename == "<template>":
            found = at.tb_lineno
        at = at.tb_next
    return found


def _lock() -> None:
    """Take from this process what a template has no use for; it cannot be had back."""
    import resource

    for limit in ("RLIMIT_NOFILE", "RLIMIT_FSIZE", "RLIMIT_CORE", "RLIMIT_NPROC"):
        if hasattr(resource, limit):
            resource.setrlimit(getattr(resource, limit), (0, 0))
    _, most = resource.getrlimit(resource.RLIMIT_DATA)
    memory = MEMORY_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_BYTES, most)
    resource.setrlimit(resource.RLIMIT_DATA, (memory, memory))


def _allow_time(cpu_s: int) -> None:
    """Let the next request have its share: beyond it the system ends this process."""
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF)
    allowed = math.ceil(used.ru_utime + used.ru_stime) + cpu_s
    _, most = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (allowed, most))


if __name__ == "__main__":
    sys.path += sys.argv[1:]
    serve(sys.stdin, sys.stdout)
