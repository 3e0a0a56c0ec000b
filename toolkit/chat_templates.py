"""A tokenizer's chat template as devices get it: the text, its special tokens, and whether it means the same there."""

from typing import Any

from fleetune.device_runtime.data.chat import TEMPLATE_MAX, open_template
from fleetune.device_runtime.errors import DataError, ExportError, FleetuneError, choices, one_line
from fleetune.toolkit.hearing import Tell, in_short

_SAMPLE = (
    {"role": "user", "content": "Turn the lamp on."},
    {"role": "assistant", "content": "It is on."},
    {"role": "user", "content": "And  the\nheater?"},
    {"role": "assistant", "content": "That too."},
)


def chat_template_of(tokenizer: Any, *, tell: Tell) -> str:
    """Return the template for chats, the one named ``default`` of several; empty where there is none, which is told.

    Raises:
        ExportError: it is too long, or writes another text on devices than in transformers.
    """
    found = getattr(tokenizer, "chat_template", None)
    if isinstance(found, dict):
        if "default" not in found:
            tell(f"chat template: the tokenizer has {choices(found)}, none of them named default")
        found = found.get("default")
    if not found:
        tell(
            "chat template: the tokenizer has none; chats are written as lines of `User: …` and `Assistant: …`"
        )
        return ""
    if len(found.encode()) > TEMPLATE_MAX:
        raise ExportError(f"its chat template has more than {TEMPLATE_MAX} bytes")
    _check(tokenizer, found, tell)
    return str(found)


def special_tokens_of(tokenizer: Any) -> dict[str, str]:
    """The special tokens by the names that a template knows them by."""
    return {
        name: str(token) for name, token in tokenizer.special_tokens_map.items() if isinstance(token, str)
    }


def _check(tokenizer: Any, template: str, tell: Tell) -> None:
    """Compare what both make of a chat; one that the template does not take in transformers says nothing."""
    try:
        wanted = tokenizer.apply_chat_template(list(_SAMPLE), chat_template=template, tokenize=False)
    except Exception as exc:  # noqa: BLE001 - a template raises what it likes
        tell(f"chat template: it does not take a plain chat in transformers: {in_short(exc)}")
        return
    try:
        with open_template(template, special_tokens_of(tokenizer), name="its chat template") as chat:
            got = chat.render(_SAMPLE, add_generation_prompt=False)
    except DataError as exc:
        raise ExportError(
            f"its chat template takes a plain chat in transformers, not on devices: {exc}"
        ) from exc
    except FleetuneError as exc:
        raise ExportError(str(exc)) from exc
    if got != wanted:
        at = next(
            (i for i, (a, b) in enumerate(zip(got, wanted, strict=False)) if a != b),
            min(len(got), len(wanted)),
        )
        tell(
            f"chat template: from character {at} on transformers writes {one_line(repr(wanted[at : at + 20]))}, devices "
            f"{one_line(repr(got[at : at + 20]))}: it reads a clock, or what devices do not have"
        )
