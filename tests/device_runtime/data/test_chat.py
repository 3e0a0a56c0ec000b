"""Chat templates come from strangers: what they write is what transformers writes, and what they may do is little."""

import os
import resource
import subprocess
import sys
from types import SimpleNamespace

import pytest
from chats import TEMPLATES, chat_tokenizer, threads

from fleetune.device_runtime.contracts.manifest import Tokenizer
from fleetune.device_runtime.data import chat as chats
from fleetune.device_runtime.data.chat import DEFAULT_TEMPLATE, open_chat, open_template
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError

TALK = [{"role": "user", "content": "on?"}, {"role": "assistant", "content": "on"}]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def render(template, messages=TALK, *, ask=False):
    with open_template(template, SPECIAL, name="t.jinja") as chat:
        return chat.render(messages, add_generation_prompt=ask)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_the_text_that_transformers_makes_of_it(name):
    tokenizer = chat_tokenizer(name)
    with open_template(TEMPLATES[name], tokenizer.special_tokens_map, name=name) as chat:
        for messages in threads(6):
            for some, ask in ((messages, False), (messages[:-1], True)):
                wanted = tokenizer.apply_chat_template(some, tokenize=False, add_generation_prompt=ask)
                assert chat.render(some, add_generation_prompt=ask) == wanted


def test_what_transformers_gives_a_template_is_there():
    template = (
        "{% set seen = namespace(n=0) %}{% for m in messages %}{% set seen.n = seen.n + 1 %}{% if loop.index > 1 %}{% break %}"
        "{% endif %}{% endfor %}{{ seen.n }}"
        "{{ dict(a='<é>') | tojson }}{{ strftime_now('%Y') }}{{ messages[0]['content'] | trim }}"
    )
    assert render(template) == '2{"a": "<é>"}2024on?'


def test_the_default_asks_and_answers_on_lines():
    assert render(DEFAULT_TEMPLATE, ask=True) == "<s>User: on?\nAssistant: on</s>\nAssistant:"


def test_a_refusal_is_the_templates_own_word():
    with pytest.raises(DataError, match=r"^the chat template refuses it: no system here$"):
        render("{{ raise_exception('no system here') }}")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for m in messages %}", "TemplateSyntaxError: .* of the template"),
        ("\n{{ messages[9].content }}", r"UndefinedError: .* \(line 2 of the template\)"),
        ("{{ 'a' * 10 ** 10 }}", "more than 256 MB of memory"),
        ("{{ 10 ** 7000 | int }}{% for i in range(10 ** 9) %}{% endfor %}", "Error: "),
        ("{% for i in range(99999) %}{{ 'a' * 999 }}{% endfor %}", "it writes more than 8 MB of one chat"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{{ namespace(__class__=1) }}", "SecurityError"),
        ("{% include '/etc/hostname' %}", "TypeError: no loader"),
        ("{{ lipsum() }}", "'lipsum' is undefined"),
    ],
)
def test_a_template_that_fails_or_takes_too_much_is_told_in_a_line(template, said):
    with pytest.raises(ArtifactError, match=rf"^t\.jinja: the chat template fails: .*{said}") as raised:
        render(template)
    assert "\n" not in str(raised.value)


def test_a_template_without_end_is_ended(monkeypatch):
    monkeypatch.setattr(chats, "CPU_S", 1)
    with pytest.raises(ArtifactError, match="takes more than 1 s of processor time for one chat"):
        render("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}")


def test_each_chat_has_its_own_time(monkeypatch):
    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda limit, pair: limits.append((limit, pair[0])))
    monkeypatch.setattr(resource, "getrusage", lambda of: SimpleNamespace(ru_utime=7.5, ru_stime=0.75))
    chats.template_process._allow_time(5)
    assert limits == [(resource.RLIMIT_CPU, 9 + 5)]


def test_its_process_can_open_nothing_and_knows_no_secret(monkeypatch):
    """As if the sandbox had been left: what the process itself is held to."""
    monkeypatch.setenv("FLEETUNE_MQTT_PASSWORD", "secret")
    code = (
        "import sys, os, socket; sys.path.insert(0, sys.argv.pop(1)); import template_process as t; t._lock()\n"
        "def tried(do):\n"
        "    try: do(); return 'done'\n"
        "    except OSError as exc: return type(exc).__name__\n"
        "print([tried(lambda: open('/etc/hostname')), tried(socket.socket), os.environ.get('FLEETUNE_MQTT_PASSWORD')])"
    )
    seen = {}

    def started(words, **options):
        seen.update(options)
        assert words[1:3] == ["-I", "-S"]
        return real(words, **options)

    real = subprocess.Popen
    with monkeypatch.context() as patch:
        patch.setattr(chats.subprocess, "Popen", started)
        render("{{ 1 }}")
    folder = os.path.dirname(chats.template_process.__file__)
    found = subprocess.run(
        [sys.executable, "-I", "-c", code, folder],
        env=seen["env"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.strip() == "['OSError', 'OSError', None]"


def test_without_jinja_the_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr(chats, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"a chat template needs jinja2; run: pip install 'fleetune\[chat\]'"
    ):
        render("a")


def test_an_artifacts_template_is_read_from_its_file(make_manifest, tmp_path):
    (tmp_path / "c.jinja").write_text("{{ bos_token }}{{ messages[0].content }}")
    tokenizer = Tokenizer("t.json", 0, 8, chat_template="c.jinja", special_tokens=SPECIAL)
    with open_chat(make_manifest(tokenizer=tokenizer), tmp_path) as chat:
        assert chat.render(TALK, add_generation_prompt=False) == "<s>on?"
    (tmp_path / "c.jinja").write_bytes(b"\xff")
    with (
        pytest.raises(ArtifactError, match="not UTF-8"),
        open_chat(make_manifest(tokenizer=tokenizer), tmp_path),
    ):
        pass
    (tmp_path / "c.jinja").write_text("a" * (chats.TEMPLATE_MAX + 1))
    with (
        pytest.raises(ArtifactError, match="expected 1048576 at most"),
        open_chat(make_manifest(tokenizer=tokenizer), tmp_path),
    ):
        pass
