"""Rules from a TOML file or a mapping: every mistake named with what is expected in its place."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.prepared import prepared
from fleetune.device_runtime.rules.rules import Rules, contradictions
from fleetune.device_runtime.toml_tables import mistakes, read_table


def load_rules(source: Mapping[str, Any] | Path | str | None) -> Rules:
    """Rules from a TOML file (the table itself, or its ``[rules]``) or from a mapping of the same form; None for none.

    Raises:
        ConfigError: an unreadable file, an unknown key, a value out of its range (all listed).
    """
    if source is None:
        return Rules()
    if isinstance(source, Mapping):
        return _checked(source, "rules")
    table = read_table(Path(source))
    return _checked(table.get("rules", table), f"{source}: rules")


def _checked(table: object, where: str) -> Rules:
    problems = list(mistakes(Rules, table, where))
    if not problems:
        rules = msgspec.convert(table, prepared(Rules))
        problems = [f"{where}.{problem}" for problem in contradictions(rules)]
    if problems:
        raise ConfigError("; ".join(problems))
    return rules
