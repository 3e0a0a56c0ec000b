"""Tables by columns: Parquet, Arrow files and streams, folders that ``datasets`` saved. Only this imports pyarrow.

A file is read a batch at a time, and of it only the columns that are wanted. What a ClassLabel of ``datasets`` numbers is given
by name: an artifact may have the same classes in another order.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from fleetune.device_runtime.data.rows import Source, Wanted
from fleetune.device_runtime.errors import DataError, choices, lacking, one_line

SPLITS, STATE, INFO = SAVED = ("dataset_dict.json", "state.json", "dataset_info.json")
"""What tells a folder of ``datasets``: of several splits, what ``save_to_disk`` wrote, and its features."""
UNPACKED_TIMES, UNPACKED_MIN = 512, 64 * 1024**2
"""Rows take at most so many times the size of their file, or so many bytes: one page may stand for any number of them."""
_ROW_BYTES = 256
"""That a row takes beside its text."""
_OBJECT_BYTES = 64
_BATCH, _PIECE = 1024, 64
_BATCH_MAX = 1 << 29
"""Bytes of one batch of an Arrow file, before its texts are looked at."""
_FILE_FORM = b"ARROW1"
_JSON_MAX = 64 * 1024**2

Names = Mapping[str, Sequence[str]]
"""Names of the classes that a column's numbers stand for."""


def read_parquet(path: Path, wanted: Wanted) -> Iterator[tuple[Source, object]]:
    """Yield the rows of a Parquet file.

    Raises:
        DataError: no Parquet file, a damaged one, a column that is missing, or rows out of all proportion to the file.
        ConfigError: pyarrow is not installed.
    """
    parquet = _pyarrow(path, "parquet").parquet
    with _refusing(path, "Parquet"):
        schema = parquet.read_schema(path)
        present, names = _present(path, schema.names, wanted), _class_names(schema.metadata or {})
        flat = [name for name in present if not schema.field(name).type.num_fields]
        with parquet.ParquetFile(path, read_dictionary=flat, pre_buffer=False) as file:
            batches = file.iter_batches(batch_size=_BATCH, columns=present, use_threads=False)
            yield from _rows(path, batches, names)


def read_arrow(path: Path, wanted: Wanted, names: Names | None = None) -> Iterator[tuple[Source, object]]:
    """Yield the rows of an Arrow file or stream; ``names`` where the file has none of its own. Errors as :func:`read_parquet`."""
    pyarrow = _pyarrow(path, "ipc")
    with _refusing(path, "Arrow"), pyarrow.memory_map(str(path)) as mapped:
        is_file = mapped.read(len(_FILE_FORM)) == _FILE_FORM
        mapped.seek(0)
        reader = pyarrow.ipc.open_file(mapped) if is_file else pyarrow.ipc.open_stream(mapped)
        present = _present(path, reader.schema.names, wanted)
        own = _class_names(reader.schema.metadata or {})
        batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
        yield from _rows(path, (batch.select(present) for batch in batches), own or names or {})


def read_saved(path: Path, wanted: Wanted) -> Iterator[tuple[Source, object]]:
    """Yield the rows of a folder that ``datasets`` saved, file after file; errors as :func:`read_parquet`."""
    if (path / SPLITS).is_file():
        splits = _json(path / SPLITS).get("splits")
        named = [str(name) for name in splits] if isinstance(splits, list) else []
        first = one_line(str(path / (named or ["train"])[0]))
        raise DataError(f"{path}: holds the splits {one_line(choices(named))}; give one of them, as {first}")
    features = _json(path / INFO).get("features") if (path / INFO).is_file() else {}
    names = _names_in(features)
    for file in _files(path):
        yield from read_arrow(file, wanted, names)


def _files(path: Path) -> list[Path]:
    if not (path / STATE).is_file():
        return sorted(path.glob("*.arrow"))
    said = _json(path / STATE).get("_data_files")
    entries = said if isinstance(said, list) else []
    names = [str(entry.get("filename", "")) if isinstance(entry, dict) else "" for entry in entries]
    if strange := [name for name in names if Path(name).name != name or not name]:
        raise DataError(f"{path / STATE}: {one_line(repr(strange[0]))} is no file of this folder")
    return [path / name for name in names]


def _json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _JSON_MAX:
            raise DataError(f"{path}: larger than {_JSON_MAX >> 20} MB")
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as exc:
        raise DataError(f"{path}: cannot be read: {getattr(exc, 'strerror', None) or exc}") from exc
    if not isinstance(found, dict):
        raise DataError(f"{path}: expected a JSON object")
    return found


def _present(path: Path, have: Sequence[str], wanted: Wanted) -> list[str]:
    wanted.check(have, Source(path, 1, "row"))
    return [name for name in have if name in wanted.names]


def _rows(path: Path, batches: Iterable[Any], names: Names) -> Iterator[tuple[Source, object]]:
    size, size_max = 0, max(UNPACKED_MIN, UNPACKED_TIMES * path.stat().st_size)
    number = 0
    for batch in batches:
        if batch.nbytes > _BATCH_MAX:
            raise DataError(f"{path}: a batch of {batch.nbytes >> 20} MB; write it in smaller ones")
        batch.validate(full=True)
        for fields in _fields(batch):
            number += 1
            size += _ROW_BYTES + _size(fields)
            if size > size_max:
                raise DataError(
                    f"{path}: its rows take more than {UNPACKED_TIMES} times the file and {UNPACKED_MIN >> 20} MB; if they are "
                    "meant to, save them as JSON lines"
                )
            yield Source(path, number, "row"), _named(fields, names)


def _size(value: Any) -> int:
    """About the bytes of a value: characters, and one for each item of a list."""
    if isinstance(value, dict):
        return _OBJECT_BYTES + sum(map(_size, value.values()))
    if isinstance(value, list):
        return len(value) + sum(map(_size, value))
    return len(value) if isinstance(value, str) else 0


def _fields(batch: Any) -> Iterator[dict[str, Any]]:
    """Rows as dictionaries, a few at a time: a short page may hold one long text many times."""
    for start in range(0, batch.num_rows, _PIECE):
        yield from batch.slice(start, _PIECE).to_pylist()


def _named(fields: dict[str, Any], names: Names) -> dict[str, Any]:
    return {
        column: _label(value, names[column]) if column in names else value for column, value in fields.items()
    }


def _label(value: Any, names: Sequence[str]) -> Any:
    if isinstance(value, list):
        return [_label(one, names) for one in value]
    return names[value] if isinstance(value, int) and 0 <= value < len(names) else value


def _class_names(metadata: Mapping[bytes, bytes]) -> Names:
    """The names in what ``datasets`` writes into a schema, of Parquet files too; none where it did not."""
    try:
        return _names_in(json.loads(metadata[b"huggingface"])["info"]["features"])
    except (KeyError, TypeError, ValueError, RecursionError):
        return {}


def _names_in(features: object) -> Names:
    found = {}
    for column, feature in features.items() if isinstance(features, dict) else ():
        of_each = feature.get("feature") if isinstance(feature, dict) else None
        kind = of_each if isinstance(of_each, dict) else feature
        if (
            isinstance(kind, dict)
            and kind.get("_type") == "ClassLabel"
            and isinstance(kind.get("names"), list)
        ):
            found[str(column)] = [str(name) for name in kind["names"]]
    return found


def _pyarrow(path: Path, module: str) -> Any:
    """pyarrow, with one of its modules loaded."""
    try:
        import_module(f"pyarrow.{module}")
        return import_module("pyarrow")
    except ImportError as exc:
        raise lacking(f"{path}", "pyarrow", "parquet") from exc


@contextmanager
def _refusing(path: Path, kind: str) -> Iterator[None]:
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as exc:
        raise DataError(f"{path}: cannot be read: No such file or directory") from exc
    except Exception as exc:  # pyarrow raises a dozen types for a damaged file
        said = one_line(str(exc) or type(exc).__name__, length_max=200)
        raise DataError(f"{path}: not a whole {kind} file: {said}; write or copy it again") from exc
