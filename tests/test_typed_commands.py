"""Whatever README and docs tell people to type is something that the command line takes: its command and options are there.

What the lines do is tested where :mod:`test_documents`, and the tests of single pages, type them.
"""

import re
import shlex

import pytest
import typer
from documents import blocks
from paths import ROOT

from fleetune.toolkit.cli import app

PAGES = [
    ROOT / "README.md",
    ROOT / "SECURITY.md",
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.stem != "lab"),
]
"""All but the log of what was measured, whose lines are of their days."""
LEFT_OUT = "…"
"""In the place of words that a page leaves out: what is missing is not looked at then."""
OURS = re.compile(r"(?:\w+=\S+ |sudo )*[\w/.-]*fleetune (?P<words>[a-z][a-z-]*(?: .*)?)")
COMMANDS = typer.main.get_command(app)


def typed(page):
    """The words of every command of ours: whole lines of blocks, and what stands between backticks in the text."""
    lines = [(line, True) for block in blocks(page) for line in block.commands]
    lines += [(line, False) for line in re.findall(r"`([^`\n]+)`", page.read_text())]
    for line, is_whole in lines:
        for part in re.split(r" && | \|\| |[;|] | &$", line):
            if found := OURS.fullmatch(part.strip()):
                yield shlex.split(found["words"]), is_whole and LEFT_OUT not in part


def found_command(words):
    """The command that the words name, and the rest of them."""
    command = COMMANDS
    while words and hasattr(command, "commands") and words[0] in command.commands:
        command, words = command.commands[words[0]], words[1:]
    return command, words


def check(words, *, is_whole):
    """Say what the command line does not take; of a whole line nothing may be missing or too much either. Nothing is run."""
    command, rest = found_command(words)
    if hasattr(command, "commands") and (is_whole or (rest and rest[0] != LEFT_OUT)):
        return [f"no command {' '.join(words)}"]
    known = {
        option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
    }
    names = [word.partition("=")[0] for word in rest if word.startswith("--")]
    wrong = [f"{command.name} has no {name}" for name in names if name not in {*known, "--help"}]
    if is_whole and not wrong:
        try:
            command.make_context(command.name, list(rest))
        except typer.Exit as refused:
            wrong.append(f"exit code {refused.exit_code}: {' '.join(words)}")
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_command_line_takes_what_pages_say(page):
    assert not [wrong for words, is_whole in typed(page) for wrong in check(words, is_whole=is_whole)]


def test_what_the_command_line_lacks_is_found():
    assert check(["train", "artifact", "--data", "x", "--out", "run"], is_whole=True) == []
    assert check(["train", "…", "--epoch", "3"], is_whole=False) == ["train has no --epoch"]
    assert check(["authority", "mint", "trust"], is_whole=True)
    assert check(["trane", "artifact"], is_whole=False)
    assert check(["train", "artifact", "more", "--data", "x", "--out", "run"], is_whole=True)
    assert check(["merge"], is_whole=True)
