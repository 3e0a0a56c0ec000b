"""The contract in plain words, and the last lines of what left: for the owner."""

import msgspec

from fleetune.device_runtime.options import fields_of
from fleetune.device_runtime.terms.left import Left
from fleetune.device_runtime.terms.terms import Terms


class Limit(msgspec.Struct, frozen=True):
    """One line of the contract."""

    name: str
    value: str
    """As a person reads it."""
    is_default: bool
    meaning: str


def limits(terms: Terms) -> list[Limit]:
    """Return every limit with its value, whether that is the default, and what it means."""
    return [
        Limit(field.name, _shown(value), value == field.default, field.option.help)
        for field in fields_of(Terms)
        for value in (getattr(terms, field.name),)
    ]


def left_in_words(line: Left) -> str:
    """Return one thing that left as a line of text."""
    parts = [
        f"{line.when} job {line.job} round {line.round}: {line.kind} of {line.samples:,} samples",
        f"{line.steps:,} steps" * bool(line.steps),
        f"{line.bytes:,} bytes" * bool(line.bytes),
        " and ".join(f"{count} {kind}" for kind, count in line.tensors.items()),
        f"{line.held_back} tensors held back" * bool(line.held_back),
        f"clipped to {line.scale:.3g} of its change" * (line.scale < 1),
        f"with noise of {line.noise:.3g} times its largest norm {line.most_norm:.3g}" * bool(line.noise),
        f"each sample hidden, epsilon {line.epsilon:.3g} spent" * bool(line.sample_noise),
        line.verdict or "no verdict yet",
    ]
    return ", ".join(filter(None, parts))


def _shown(value: float | str) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return value or "all"
    return f"{value:,.15g}" if value else "no limit"
