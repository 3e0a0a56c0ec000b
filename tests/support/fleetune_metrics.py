"""Reads Prometheus' text format strictly, as its specification has it."""

import re

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\["\\n])*)"(,|$)')
_PLAIN = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


def samples_of(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by (name, labels); every name has its help and its type before it, once, and every sample comes once."""
    assert text.endswith("\n")
    found, kinds, helps = {}, {}, set()
    for line in text.splitlines():
        if line.startswith("# HELP "):
            name = line.split()[2]
            assert name not in helps
            helps.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert kind in ("gauge", "counter")
            kinds[name] = kind
        else:
            name = _NAME.match(line).group()
            labels, value = line[len(name) + 1 :].rsplit("} ", 1)
            assert name in kinds
            assert name in helps
            key = (name, tuple(_labels(labels)))
            assert key not in found
            found[key] = float(value)
            assert (kinds[name] == "counter") == name.endswith("_total")
    return found


def _labels(text):
    while text:
        match = _LABEL.match(text)
        assert match, text
        yield match.group(1), re.sub(r'\\["\\n]', lambda one: _PLAIN[one.group()], match.group(2))
        text = text[match.end() :]
