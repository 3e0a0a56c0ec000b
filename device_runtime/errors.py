"""Every error a user can meet, named by who must act on it."""

from collections.abc import Iterable, Sequence


class FleetuneError(Exception):
    """Root of our errors; the command line prints its message on one line and exits with 1."""


class ArtifactError(FleetuneError):
    """The artifact is damaged, foreign or too new: export it again."""


class ConfigError(FleetuneError):
    """A flag or a configuration file is wrong: fix it."""


class UnknownName(ConfigError):
    """A name is in no registry: choose one of those listed."""


class TooLittleMemory(ConfigError):
    """The work does not fit the memory that there is, or is allowed: ask for less."""


class DayIsSpent(FleetuneError):
    """What a device's owner allows in a day is used up: wait, or allow more."""


class DataError(FleetuneError):
    """A data file does not say what it should: fix the line named."""


class WireError(FleetuneError):
    """A message is malformed, oversized or inconsistent: drop it."""


class OtherMemory(WireError):
    """An update is encoded with a memory that is not kept here: offer its task again."""


class TransportError(FleetuneError):
    """The MQTT server is away or refuses us: retry, or fix the address."""


class StateError(FleetuneError):
    """State on disk cannot be used: free the disk, or move the file named away."""


class ExportError(FleetuneError):
    """The model cannot be exported as asked: the message names the module and the reason."""


def lacking(what: str, library: str, extra: str) -> ConfigError:
    """Make the error of ``what`` for which a library is missing that an extra brings."""
    return ConfigError(f"{what} needs {library}; run: pip install 'fleetune[{extra}]'")


def choices(names: Iterable[str]) -> str:
    """Join ``names`` as error messages list them."""
    return ", ".join(sorted(name or "''" for name in names)) or "nothing"


def some(names: Sequence[str], *, at_most: int = 5, by: str = ", ") -> str:
    """Join the first few of ``names``, and say how many more there are."""
    more = f" and {len(names) - at_most} more" if len(names) > at_most else ""
    return by.join(names[:at_most]) + more


def one_line(text: object, *, length_max: int = 200) -> str:
    """Show ``text`` that a stranger may have written: printable, on one line, not endless."""
    shown = str(text)[: length_max + 1]
    if not shown.isprintable():
        shown = "".join(c if c.isprintable() else "?" for c in shown)
    return shown if len(shown) <= length_max else shown[: length_max - 1] + "…"
