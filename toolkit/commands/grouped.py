"""How a command explains itself, in plain text: ``--help`` under headings, and wrong usage on one line."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperCommand, TyperGroup

from fleetune.toolkit.commands.running import fail_usage

_OWN, _ARGUMENTS = "Options", "Arguments"


class Commands(TyperGroup):
    """Commands below one word; tells wrong usage as every other error is told."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the words before the command."""
        with usage_told(ctx):
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the command that the words name."""
        with usage_told(ctx):
            return super().invoke(ctx)


class Grouped(TyperCommand):
    """A command whose options stand under the headings that ``rich_help_panel`` says."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Parse the words after the command's name."""
        with usage_told(ctx):
            return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        """``DIR``, where newer Typers write ``{DIR}``."""
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then the command's own options, then each group in the order it is first met."""
        groups: dict[str, list[tuple[str, str]]] = {_ARGUMENTS: [], _OWN: []}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                groups.setdefault(_heading(parameter), []).append(record)
        for heading, records in groups.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


@contextmanager
def usage_told(ctx: Any) -> Iterator[None]:
    """Turn what Typer says of wrong words, in three lines and more, into one of ours; ``fleetune`` alone still gets its help."""
    try:
        yield
    except Exception as exc:
        usage: Any = exc  # of click, which Typer brings in a copy of its own or not
        if not hasattr(usage, "format_message") or type(usage).__name__ == "NoArgsIsHelpError":
            raise
        said = usage.format_message().rstrip(".")
        fail_usage(said[:1].lower() + said[1:], command=" ".join(ctx.command_path.split()[1:]))


def _heading(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _ARGUMENTS
    return getattr(parameter, "rich_help_panel", None) or _OWN
