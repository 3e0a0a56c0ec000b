"""Reads out of a Markdown page what it tells people to type, and the files that it shows."""

import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

_NAMED = re.compile(r"# (?P<name>[\w./-]*\.\w+)\b.*\n")


class Block(NamedTuple):
    """One block of code under a heading; ``language`` is empty where it is indented."""

    heading: str
    language: str
    text: str

    @property
    def file(self) -> str:
        """The name of the file that it shows, from a remark in its first line."""
        named = _NAMED.match(self.text)
        return named["name"] if named else ""

    @property
    def commands(self) -> list[str]:
        """Its command lines, continuation lines joined, without remarks; none if it shows a file or another language."""
        if self.file or self.language not in ("", "sh", "bash"):
            return []
        lines = re.sub(r" *\\\n\s*", " ", self.text).splitlines()
        return [bare for line in lines if (bare := re.sub(r"(^|\s+)#\s.*$", "", line).strip())]


def blocks(page: Path) -> list[Block]:
    """The blocks of a page, in order."""
    found, heading = [], ""
    tokens = MarkdownIt().parse(page.read_text())
    for before, token in zip([None, *tokens], tokens, strict=False):
        if before is not None and before.type == "heading_open":
            heading = token.content
        if token.type in ("fence", "code_block"):
            found.append(Block(heading, token.info.strip(), token.content))
    return found
