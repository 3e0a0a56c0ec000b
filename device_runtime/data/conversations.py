"""Rows for language models as text: chats through their template, prompts with completions, plain texts."""

from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any, NamedTuple

from fleetune.device_runtime.data.chat import Chat, Rendered
from fleetune.device_runtime.data.messages import ASSISTANT, CALLS, TOOL, Message, read_messages, read_tools
from fleetune.device_runtime.data.records import Language, Messages
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.data.sequences import ALL
from fleetune.device_runtime.errors import ArtifactError, DataError, FleetuneError, one_line

Tools = Sequence[dict[str, Any]]
Span = tuple[int, int]
OpenChat = Callable[[], Chat]
"""Starts what renders chats, when the first is there."""


class Written(NamedTuple):
    """A row, or one answer of it, as text."""

    text: str
    answers: tuple[Span, ...] | None = None
    """Parts that count, in characters; None for all."""
    pair: str = ""
    is_plain: bool = False
    """Whether the tokenizer adds its special tokens; a template has written them."""
    ends: bool = False
    """Whether the end of text belongs after it."""


def written(row: Language, source: Source, chat: OpenChat, *, loss_on: str) -> Iterator[Written]:
    """Write a row as text, or several: a template may write an answer otherwise when more follows it.

    Raises:
        DataError: no answer, no text, messages that are none, or that the template refuses; names the row.
        ArtifactError: the template does not work; names the row too.
    """
    try:
        yield from _written(row, source, chat, loss_on)
    except ArtifactError as exc:
        raise ArtifactError(f"{source.error(str(exc))}; mend the template and export again") from exc


def _written(row: Language, source: Source, chat: OpenChat, loss_on: str) -> Iterator[Written]:
    tools = read_tools(row.tools, source)
    if found := row.messages or row.conversations:
        yield from _chat(read_messages(found, source), tools, source, chat, loss_on)
    elif row.completion is not None and row.prompt is not None:
        yield from _pair(row.prompt, row.completion, tools, source, chat, loss_on)
    elif (row.text or "").strip():
        yield Written(row.text or "", None, row.text_b, is_plain=True, ends=True)
    else:
        raise source.error("the text is empty" if row.text is not None else "there is nothing in this row")


def _pair(
    prompt: Messages,
    completion: Messages,
    tools: Tools,
    source: Source,
    chat: OpenChat,
    loss_on: str,
) -> Iterator[Written]:
    if isinstance(completion, list):
        before = read_messages(prompt, source) if prompt else []
        whole = [*before, *read_messages(completion, source)]
        yield from _chat(whole, tools, source, chat, loss_on, first=len(before))
        return
    if not isinstance(prompt, str):
        raise source.error("the prompt is messages and the completion a text; expected both of one form")
    if not completion.strip():
        raise source.error("the completion is empty; write one, or leave the row away")
    text = prompt + completion
    spans = None if loss_on == ALL else ((len(prompt), len(text)),)
    yield Written(text, spans, is_plain=True, ends=True)


def _chat(
    messages: Sequence[Message],
    tools: Tools,
    source: Source,
    chat: OpenChat,
    loss_on: str,
    *,
    first: int = 0,
) -> Iterator[Written]:
    """A chat, of which the answers from message ``first`` on count."""
    answers = [i for i, message in enumerate(messages) if i >= first and message["role"] == ASSISTANT]
    if not answers and loss_on != ALL:
        raise source.error(
            f"the chat has no answer, no message of the role {ASSISTANT}; add one, leave the row away, or count all of it "
            "(--loss-on all)"
        )
    if empty := [i for i in answers if _says_nothing(messages[i])]:
        raise source.error(
            f"message {empty[0] + 1}, an answer, is empty; write one, or leave the message away"
        )
    try:
        opened = chat()
        if unseen := _unseen(messages, tools, opened):
            raise source.error(
                f"the chat template does not write {unseen}; leave it away, or export a model whose template does"
            )
        yield from _rendered(messages, answers, _With(opened, tools), loss_on, first=first)
    except DataError as exc:
        roles = ", ".join(one_line(message["role"], length_max=20) for message in messages[:8])
        raise source.error(f"{exc}; mend its messages, which are of {roles}") from exc


def _says_nothing(answer: Message) -> bool:
    return not answer.get("content") and CALLS not in answer and len(answer) < 3


class _With(NamedTuple):
    """What renders chats, with the tools of one."""

    chat: Chat
    tools: Tools

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> str:
        return self.chat.render(messages, add_generation_prompt=add_generation_prompt, tools=self.tools)

    def rendered(self, messages: Sequence[Message]) -> Rendered:
        return self.chat.rendered(messages, tools=self.tools)


def _unseen(messages: Sequence[Message], tools: Tools, chat: Chat) -> str:
    """What of a chat with tools the template leaves out: the text is the same without it. Empty if it is all there."""
    if not tools and not any(CALLS in one or one["role"] == TOOL for one in messages):
        return ""
    whole = chat.rendered(messages, tools=tools).text

    def is_same(changed: Sequence[Message], tools: Tools = tools) -> bool:
        try:
            return chat.rendered(changed, tools=tools).text == whole
        except FleetuneError:  # it looks at what was changed
            return False

    if tools and is_same(messages, []):
        return "tools"
    for i, one in enumerate(messages):
        others = {name: value for name, value in one.items() if name != CALLS}
        if CALLS in one and is_same([*messages[:i], {"content": "", **others}, *messages[i + 1 :]]):
            return f"the tool calls of message {i + 1}"
        other = {**one, "content": f"{one.get('content', '')}0"}
        if one["role"] == TOOL and is_same([*messages[:i], other, *messages[i + 1 :]]):
            return f"message {i + 1}, of the role {TOOL}"
    return ""


def _rendered(
    messages: Sequence[Message], answers: Sequence[int], chat: _With, loss_on: str, *, first: int
) -> Iterator[Written]:
    whole = chat.rendered(messages)
    ends = _is_bare(whole.text, messages)
    if loss_on == ALL:
        yield Written(whole.text, ends=ends)
        return
    if whole.spans:
        start = len(chat.render(messages[:first], add_generation_prompt=False)) if first else 0
        marked = tuple(span for span in whole.spans if span[0] >= start)
        yield Written(whole.text, marked, ends=ends)
        return
    spans: list[Span] = []
    alone: list[Written] = []
    for i in answers:
        upto = (
            whole.text
            if i == len(messages) - 1
            else chat.render(messages[: i + 1], add_generation_prompt=False)
        )
        span = _start(messages[:i], upto, chat), len(upto)
        if whole.text.startswith(upto):
            spans.append(span)
        else:
            alone.append(Written(upto, (span,), ends=_is_bare(upto, messages[: i + 1])))
    if spans:
        alone.append(Written(whole.text, tuple(spans), ends=ends))
    yield from alone


def _start(before: Sequence[Message], text: str, chat: _With) -> int:
    """Where the answer that ends ``text`` begins: after what asks for it, as far as the template repeats that.

    Raises:
        DataError: the text does not go on from the messages before.
    """
    if not before:
        return 0
    asked = chat.render(before, add_generation_prompt=True)
    if text.startswith(asked):
        return len(asked)
    history = chat.render(before, add_generation_prompt=False)
    if not text.startswith(history):
        raise DataError(
            "the chat template writes what comes before an answer otherwise when the answer follows, so that none can be told "
            "apart; count all of it (--loss-on all), or give prompt and completion"
        )
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(asked, text, strict=False)))


def _is_bare(text: str, messages: Sequence[Message]) -> bool:
    """Whether the template puts nothing after a last message that is an answer."""
    last = messages[-1]
    content = last.get("content", "").strip()
    return last["role"] == ASSISTANT and bool(content) and text.rstrip().endswith(content)
