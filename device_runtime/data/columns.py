"""Which columns of a data file a record is read from, where they are not called as the record's fields are."""

from collections.abc import Mapping
from functools import cache
from typing import Annotated, Any, TypeVar

import msgspec

from fleetune.device_runtime.errors import ConfigError
from fleetune.device_runtime.options import Option

R = TypeVar("R", bound=msgspec.Struct)

REMEDY = "--text-column, --pair-column and --label-column say which"
LANGUAGE_REMEDY = "--messages-column, --prompt-column, --completion-column and --text-column say which"


class Columns(msgspec.Struct, frozen=True, kw_only=True):
    """Columns of a data file by what they hold; one that is named here must be there."""

    text_column: Annotated[
        str, Option("column of the texts, or of a text's words; without it text, or tokens")
    ] = ""
    pair_column: Annotated[str, Option("column of the second text of a pair; without it text_b, if any")] = ""
    label_column: Annotated[
        str, Option("column of the labels, or of the words' labels; without it label, or labels")
    ] = ""
    messages_column: Annotated[str, Option("column of the chats; without it messages, if any")] = ""
    prompt_column: Annotated[str, Option("column of the prompts; without it prompt, if any")] = ""
    completion_column: Annotated[
        str, Option("column of what follows the prompts; without it completion, if any")
    ] = ""

    def of(self, kind: type[R]) -> type[R]:
        """Return ``kind`` with its fields read from these columns; columns for what it has no field for are not looked at.

        Raises:
            ConfigError: two fields from one column.
        """
        places = {
            "text": self.text_column,
            "tokens": self.text_column,
            "text_b": self.pair_column,
            "label": self.label_column,
            "labels": self.label_column,
            "messages": self.messages_column,
            "prompt": self.prompt_column,
            "completion": self.completion_column,
        }
        names = {f.name: places.get(f.name, "") for f in msgspec.structs.fields(kind)}
        given = tuple((name, column) for name, column in names.items() if column)
        return _renamed(kind, given) if given else kind


@cache
def _renamed(kind: type[R], given: tuple[tuple[str, str], ...]) -> type[R]:
    """A kind whose fields have these names in a file, and no default where they are given."""
    columns = dict(given)
    _check({f.name: columns.get(f.name, f.name) for f in msgspec.structs.fields(kind)})
    fields: list[Any] = [
        (f.name, f.type) if f.required or f.name in columns else (f.name, f.type, f.default)
        for f in msgspec.structs.fields(kind)
    ]
    made: Any = msgspec.defstruct(
        kind.__name__, fields, bases=(kind,), rename=columns, frozen=True, kw_only=True
    )
    return made  # type: ignore[no-any-return]


def _check(columns: Mapping[str, str]) -> None:
    if len(set(columns.values())) < len(columns):
        shown = ", ".join(f"{field} from {column!r}" for field, column in columns.items())
        raise ConfigError(f"two fields from one column: {shown}")
