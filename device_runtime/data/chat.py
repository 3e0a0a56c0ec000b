"""Chats as text: the artifact's chat template, in a process of its own, for it comes from a stranger."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from fleetune.device_runtime.contracts.manifest import Manifest
from fleetune.device_runtime.data import template_process
from fleetune.device_runtime.data.template_process import REFUSED
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError, lacking, one_line
from fleetune.device_runtime.prepared import prepared

Message = Mapping[str, Any]
"""``role`` and ``content``, and what else a template reads."""
Tool = Mapping[str, Any]
"""What may be called, as a JSON schema: ``{"type": "function", "function": {"name": …, "parameters": …}}``."""

CPU_S = 5
"""Seconds of processor time that one chat may take; a second is added for what was used of the last."""
TEMPLATE_MAX = 1024**2
"""Bytes of a template; the longest that we know have 20,000."""
DEFAULT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message.role | capitalize }}: {{ message.content | trim }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)
"""Of a tokenizer without one: ``User: …`` and ``Assistant: …``, a line each, the end of text after each answer."""
_ANSWER_MAX = 12 * template_process.TEXT_MAX
"""Bytes of an answer of the process: each character may take six, and spans are beside them."""
_OWN_ENVIRONMENT = ("LD_LIBRARY_PATH",)
"""What Python itself may need to start; nothing else of the environment, which holds secrets, is handed on."""


class Rendered(NamedTuple):
    """A chat as text; ``spans`` are the parts, in characters, that the template marks as said by the assistant."""

    text: str
    spans: tuple[tuple[int, int], ...]


class _Answer(msgspec.Struct, frozen=True):
    text: str = ""
    spans: tuple[tuple[int, int], ...] = ()
    error: str = ""
    said: str = ""


class Chat:
    """Renders chats, one after the other; made by :func:`open_chat`, and closed with it."""

    def __init__(self, process: "subprocess.Popen[bytes]", name: str) -> None:
        """Take a started process; ``name`` is the template's, for messages."""
        self._process, self._name = process, name

    def render(
        self, messages: Sequence[Message], *, add_generation_prompt: bool, tools: Sequence[Tool] = ()
    ) -> str:
        """Write messages as the model reads them; with ``add_generation_prompt`` it ends where an answer begins.

        The text has its special tokens in it: the tokenizer adds none. ``tools`` are what the assistant may call.

        Raises:
            DataError: the template refuses these messages.
            ArtifactError: it does not work, or takes more time, memory or text than it may.
        """
        return self.rendered(messages, add_generation_prompt=add_generation_prompt, tools=tools).text

    def rendered(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = False,
        tools: Sequence[Tool] = (),
    ) -> Rendered:
        """As :meth:`render`, with what the template marks by ``{% generation %}``."""
        asked = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        found = self._ask(asked | ({"tools": tools} if tools else {}))
        return Rendered(found.text, found.spans)

    def begin(self, template: str, variables: Mapping[str, str]) -> None:
        """Give the process its template; ArtifactError if it is none."""
        self._ask({"template": template, "variables": variables, "cpu_s": CPU_S})

    def _ask(self, request: Mapping[str, Any]) -> _Answer:
        to, of = self._process.stdin, self._process.stdout
        if to is None or of is None:
            raise ArtifactError(f"{self._name}: its process has no pipes")
        try:
            to.write(json.dumps(request).encode() + b"\n")
            to.flush()
            line = of.readline(_ANSWER_MAX)
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            raise ArtifactError(f"{self._name}: {self._death(line)}")
        try:
            found = msgspec.json.decode(line, type=prepared(_Answer))
        except msgspec.MsgspecError as exc:
            raise ArtifactError(f"{self._name}: its process answers nonsense: {exc}") from exc
        if found.error:
            said = one_line(found.said, length_max=300)
            if found.error == REFUSED:
                raise DataError(f"the chat template refuses it: {said}")
            raise ArtifactError(f"{self._name}: the chat template fails: {said}")
        return found

    def _death(self, line: bytes) -> str:
        """Why there is no whole answer."""
        if line:
            return "the chat template writes too much"
        code = self._process.wait()
        if code in (-signal.SIGXCPU, -signal.SIGKILL):
            return f"the chat template takes more than {CPU_S} s of processor time for one chat, or too much memory"
        return f"the chat template ended its process (exit status {code})"


@contextmanager
def open_chat(manifest: Manifest, folder: Path) -> Iterator[Chat]:
    """Start what renders an artifact's chats: its own template, or DEFAULT_TEMPLATE where it has none.

    Args:
        manifest: names the template and the special tokens.
        folder: the artifact's.

    Raises:
        ConfigError: jinja2 is not installed, or no process can be started.
        ArtifactError: there is no tokenizer, or the template is none.
    """
    tokenizer = manifest.tokenizer
    if tokenizer is None:
        raise ArtifactError(f"{folder}: no tokenizer in the artifact, so no chats; data are NPZ files of ids")
    path = folder / tokenizer.chat_template
    template, name = (
        (_read(path), str(path))
        if tokenizer.chat_template
        else (DEFAULT_TEMPLATE, "the default chat template")
    )
    with open_template(template, tokenizer.special_tokens, name=name) as chat:
        yield chat


@contextmanager
def open_template(template: str, variables: Mapping[str, str], *, name: str) -> Iterator[Chat]:
    """Start what renders chats by a template; ``variables`` are its special tokens. Errors as :func:`open_chat`."""
    process = _started(_jinja_folders())
    try:
        chat = Chat(process, name)
        chat.begin(template, variables)
        yield chat
    finally:
        process.kill()
        for pipe in (process.stdin, process.stdout):
            _close(pipe)
        process.wait()


def _read(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as exc:
        raise ArtifactError(f"{path}: cannot be read: {exc.strerror}") from exc
    if len(content) > TEMPLATE_MAX:
        raise ArtifactError(
            f"{path}: a chat template of {len(content)} bytes; expected {TEMPLATE_MAX} at most"
        )
    try:
        return content.decode()
    except UnicodeDecodeError as exc:
        raise ArtifactError(f"{path}: not UTF-8: {exc}; export again") from exc


def _jinja_folders() -> list[str]:
    """Where the process finds jinja2 and what it needs: it looks nowhere else."""
    found = [find_spec(name) for name in ("jinja2", "markupsafe")]
    places = [Path(spec.origin).parents[1] for spec in found if spec and spec.origin]
    if len(places) < len(found):
        raise lacking("a chat template", "jinja2", "chat")
    return list(dict.fromkeys(map(str, places)))


def _started(places: Sequence[str]) -> "subprocess.Popen[bytes]":
    script = template_process.__file__
    try:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", "-X", "utf8", script, *places],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd="/",
            env={name: os.environ[name] for name in _OWN_ENVIRONMENT if name in os.environ},
        )
    except OSError as exc:
        raise ConfigError(
            f"no process for the chat template can be started ({exc.strerror}): chats need one"
        ) from exc


def _close(pipe: Any) -> None:
    with suppress(BrokenPipeError):  # what a process that is gone did not read
        pipe.close()
