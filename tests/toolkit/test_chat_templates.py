"""A chat template goes into the artifact as transformers has it, and what differs on devices is told at export."""

import pytest
from chats import TEMPLATES, chat_tokenizer
from make_chat_artifact import FOLDER

from fleetune.device_runtime.contracts.artifact import CHAT_TEMPLATE, open_artifact
from fleetune.device_runtime.errors import ExportError
from fleetune.toolkit.chat_templates import chat_template_of, special_tokens_of


def told(template: object) -> tuple[str, list[str]]:
    notes: list[str] = []
    tokenizer = chat_tokenizer()
    tokenizer.chat_template = template
    return chat_template_of(tokenizer, tell=notes.append), notes


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_means_the_same_is_kept_without_a_word(name: str) -> None:
    assert told(TEMPLATES[name]) == (TEMPLATES[name], [])


def test_of_several_templates_the_default_is_kept() -> None:
    assert told({"tools": "x", "default": TEMPLATES["chatml"]}) == (TEMPLATES["chatml"], [])
    template, (first, second) = told({"tools": "x", "rag": "y"})
    assert template == ""
    assert first == "chat template: the tokenizer has rag, tools, none of them named default"
    assert second.startswith("chat template: the tokenizer has none; chats are written as lines of `User: …`")


def test_a_template_with_a_clock_is_kept_and_told() -> None:
    template = "{{ strftime_now('%d %B %Y') }}" + TEMPLATES["chatml"]
    kept, (note,) = told(template)
    assert kept == template
    assert "July 2024" in note.partition("devices")[2]


def test_a_template_that_fails_in_transformers_is_told() -> None:
    _, (note,) = told("{{ raise_exception('never') }}")
    assert note.startswith("chat template: it does not take a plain chat in transformers: ")


def test_a_template_that_devices_do_not_take_is_refused() -> None:
    with pytest.raises(
        ExportError, match=r"its chat template: the chat template fails: .*'lipsum' is undefined"
    ):
        told("{{ lipsum(n=1) }}")
    with pytest.raises(ExportError, match="its chat template has more than 1048576 bytes"):
        told("a" * (1024**2 + 1))


def test_the_artifact_has_the_template_and_the_tokens_that_it_names() -> None:
    found = open_artifact(FOLDER).manifest
    assert found.tokenizer is not None
    assert found.tokenizer.chat_template == CHAT_TEMPLATE in found.files
    assert (FOLDER / CHAT_TEMPLATE).read_text() == TEMPLATES["marked"]
    assert found.tokenizer.special_tokens == special_tokens_of(chat_tokenizer())
    assert found.tokenizer.end_of_text == "<|im_end|>"
