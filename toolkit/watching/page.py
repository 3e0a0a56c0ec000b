"""The page: one answer with its style and its script inside, so that nothing is fetched from anywhere."""

from functools import cache
from importlib.resources import files


def page(nonce: str) -> bytes:
    """Return the page; its style and script run under ``nonce`` alone."""
    return _template().replace("NONCE", nonce).encode()


@cache
def _template() -> str:
    read = {
        name: (files(__package__) / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js")
    }
    return read["page.html"].replace("/*STYLE*/", read["page.css"]).replace("/*SCRIPT*/", read["page.js"])
