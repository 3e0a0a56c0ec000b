"""``--help`` with a heading for each group of options, in plain text: what it is piped into, or quoted in, gets no boxes."""

from typing import Any

from typer.core import TyperCommand

_OWN, _ARGUMENTS = "Options", "Arguments"


class Grouped(TyperCommand):
    """A command whose options stand under the headings that ``rich_help_panel`` says."""

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


def _heading(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _ARGUMENTS
    return getattr(parameter, "rich_help_panel", None) or _OWN
