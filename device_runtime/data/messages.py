"""The messages of a chat and its tools, of whatever form they come in, as chat templates take them."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from fleetune.device_runtime.data.records import Messages, Tools
from fleetune.device_runtime.data.rows import Source
from fleetune.device_runtime.errors import choices, one_line
from fleetune.device_runtime.prepared import prepared

ASSISTANT, TOOL, CALLS = "assistant", "tool", "tool_calls"
_CALL = "function_call"
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bard", "bing", ASSISTANT), ASSISTANT),
    **dict.fromkeys(("observation", "function_response", TOOL), TOOL),
    "system": "system",
    _CALL: ASSISTANT,
}
"""Of what ShareGPT's messages are ``from``."""

Message = dict[str, Any]


def read_messages(found: Messages, source: Source) -> list[Message]:
    """Read messages with ``role`` and ``content``, or with ``from`` and ``value``; as JSON where they are a text.

    Contents in parts are put together, and arguments of tool calls that are JSON in a text are read. Null is as if it were not
    there.

    Raises:
        DataError: what is no message; names the row and the message.
    """
    if isinstance(found, str):
        found = _array(found, "messages", source)
    return [_message(_bare(message), number, source) for number, message in enumerate(found, 1)]


def read_tools(found: Tools | None, source: Source) -> list[dict[str, Any]]:
    """Read what an assistant may call, as JSON where it is a text; none where there is nothing. DataError names the row."""
    if isinstance(found, str) and found.strip():
        found = _array(found, "tools", source)
    return [_bare(tool) for tool in found or [] if isinstance(tool, dict)]


def _message(found: Message, number: int, source: Source) -> Message:
    if "role" not in found and "from" in found:
        found = _of_sharegpt(found, number, source)
    role, content = found.get("role"), found.get("content", "")
    if not isinstance(role, str):
        raise source.error(
            f"message {number} has no role; expected role and content, as user and a text, or from and value"
        )
    if isinstance(content, list):
        content = found["content"] = "".join(_part(part, number, source) for part in content)
    if not isinstance(content, str):
        raise source.error(f"the content of message {number} is no text")
    if CALLS in found:
        found[CALLS] = [_call(call, number, source) for call in _listed(found[CALLS])]
    return found


def _of_sharegpt(found: Message, number: int, source: Source) -> Message:
    said, value = found["from"], found.get("value", "")
    role = _ROLES.get(said) if isinstance(said, str) else None
    if role is None:
        shown = one_line(repr(said), length_max=40)
        raise source.error(f"message {number} is from {shown}; expected one of {choices(_ROLES)}")
    rest = {name: value for name, value in found.items() if name not in ("from", "value")}
    if said != _CALL:
        return {"role": role, "content": value, **rest}
    return {
        "role": role,
        CALLS: [{"type": "function", "function": call} for call in _listed(_json(value))],
        **rest,
    }


def _call(call: Any, number: int, source: Source) -> Message:
    """A call with its arguments as an object, as templates expect it; OpenAI has them as JSON in a text."""
    inner = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(inner, dict) or not isinstance(inner.get("name"), str):
        raise source.error(f"message {number} calls a tool without a name; expected name and arguments")
    arguments = _json(inner.get("arguments", {}))
    if not isinstance(arguments, dict):
        raise source.error(
            f"message {number}: the arguments of {one_line(inner['name'], length_max=40)!r} are no JSON object"
        )
    inner = {**inner, "arguments": arguments}
    return {**call, "function": inner} if "function" in call else inner


def _array(text: str, what: str, source: Source) -> list[dict[str, Any]]:
    try:
        return msgspec.json.decode(text, type=prepared(list[dict[str, Any]]))
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise source.error(f"its {what} are no JSON array of {what}: {exc}") from exc


def _json(value: Any) -> Any:
    """What a text holds as JSON; itself where it is none."""
    if not isinstance(value, str):
        return value
    try:
        return msgspec.json.decode(value)
    except (msgspec.MsgspecError, RecursionError):
        return value


def _listed(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list) else [value]


def _bare(value: Any) -> Any:
    """A value without what is null in its objects: a table has a cell for whatever another row's has."""
    if isinstance(value, Mapping):
        return {name: _bare(one) for name, one in value.items() if one is not None}
    return [_bare(one) for one in value] if isinstance(value, list) else value


def _part(part: Any, number: int, source: Source) -> str:
    """The text of one part of a content in OpenAI's form."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(part.get("text"), str):
        shown = one_line(repr(kind), length_max=40)
        raise source.error(
            f"message {number} has a part of type {shown}; only texts are taken, leave the others away"
        )
    return str(part["text"])
