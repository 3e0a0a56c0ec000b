"""Spoils files as a damaged card, a hurried editor or a stranger would: each spoiler takes a path and draws from ``rng``."""

import csv
import io
import json
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np

NASTY: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63 - 1,
    2**64,
    1e308,
    float("nan"),
    float("-inf"),
    "",
    " ",
    "nan",
    "ä",
    "a\nb",
    "\x1b[31m",
    "../../etc/passwd",
    "x" * 3000,
    [],
    {},
    [[]],
    [0],
    {"a": 1},
    "float32",
    "V9",
    "int8",
    "\u202e",
    "\ud800",
)


def spoil(path: Path, rng: random.Random) -> str:
    """Spoil one file; returns what was done, for a message."""
    ways = [*_ANY, *(3 * _BY_SUFFIX.get(path.suffix, []))]
    way = rng.choice(ways)
    try:
        way(path, rng)
    except (ValueError, KeyError, IndexError, TypeError, OSError, sqlite3.Error):
        _flip(path, rng)  # it was spoilt before, beyond what this way can read
    return f"{way.__name__.strip('_')} {path.name}"


def _flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes() or b"\0")
    for _ in range(rng.choice([1, 1, 8])):
        content[rng.randrange(len(content))] = rng.randrange(256)
    path.write_bytes(content)


def _cut(path: Path, rng: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: rng.choice([0, 1, 8, len(content) // 2, len(content) - 1])])


def _grow(path: Path, rng: random.Random) -> None:
    with path.open("ab") as file:
        file.write(rng.choice([b"\0", b"\n\n", b"{", rng.randbytes(100)]))


def _lose(path: Path, rng: random.Random) -> None:
    path.unlink()


def _become_folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


def _become_loop(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.symlink_to(path.name)


def _become_another(path: Path, rng: random.Random) -> None:
    others = sorted(p for p in path.parent.iterdir() if p.is_file() and p != path)
    shutil.copyfile(rng.choice(others), path)


def _edit_json(path: Path, rng: random.Random) -> None:
    tree = json.loads(path.read_text())
    _edit(tree, rng)
    path.write_text(json.dumps(tree))


def _edit(tree: Any, rng: random.Random) -> None:
    """Replace, delete or add one value somewhere in it."""
    while True:
        keys = sorted(tree) if isinstance(tree, dict) else range(len(tree))
        key = rng.choice(list(keys))
        if isinstance(tree[key], (dict, list)) and tree[key] and rng.random() < 0.8:
            tree = tree[key]
            continue
        if rng.random() < 0.2:
            del tree[key]
        elif rng.random() < 0.1 and isinstance(tree, dict):
            tree[f"{key}_"] = tree[key]
        else:
            tree[key] = rng.choice(NASTY)
        return


def _edit_lines(path: Path, rng: random.Random) -> None:
    lines = path.read_bytes().splitlines() or [b""]
    at = rng.randrange(len(lines) + 1)
    odd = [
        b"",
        b"\xff\xfe",
        b"\x00",
        b'"',
        b"a,b,c,d",
        b"[]",
        b"{}",
        b'{"text": 1}',
        b"[" * 5000,
        b"=",
        b"x = [1,",
        b"[device]",
        b"\xef\xbb\xbf",
    ]
    if rng.random() < 0.5:
        lines.insert(at, rng.choice(odd))
    else:
        lines[at % len(lines)] = rng.choice(odd)
    path.write_bytes(b"\n".join(lines) + rng.choice([b"\n", b"", b"\r\n"]))


def _edit_record(path: Path, rng: random.Random) -> None:
    """Another value in a field of one line."""
    lines = path.read_text().splitlines()
    at = rng.randrange(1, len(lines))
    value = rng.choice(NASTY)
    if path.suffix == ".jsonl":
        record = json.loads(lines[at])
        record[rng.choice(sorted(record))] = value
        lines[at] = json.dumps(record)
    else:
        row = io.StringIO()
        csv.writer(row).writerow(rng.sample([*lines[at].split(","), value], 2))
        lines[at] = row.getvalue()
    path.write_text("\n".join(lines), errors="surrogatepass")


def _edit_setting(path: Path, rng: random.Random) -> None:
    """Another value behind one ``=``."""
    lines = path.read_text().splitlines()
    at = rng.choice([i for i, line in enumerate(lines) if "=" in line])
    values = [
        "-1",
        "0",
        "nan",
        "inf",
        "9" * 30,
        '""',
        '"x"',
        "[]",
        "{}",
        "true",
        "1979-05-27",
        "{ a = 1 }",
        "x",
        '"\\u0000"',
        "1e400",
    ]
    lines[at] = f"{lines[at].split('=')[0]}= {rng.choice(values)}"
    path.write_text("\n".join(lines) + "\n")


def _edit_arrays(path: Path, rng: random.Random) -> None:
    with np.load(path) as file:
        arrays = dict(file)
    name = rng.choice(sorted(arrays))
    value = arrays[name]
    arrays[name] = rng.choice(
        [
            value[:0],
            value[:1],
            value[..., None],
            value.astype("f8") / 0.3,
            value * 0 - 1,
            value * 0 + 2**40,
            value.astype("U3"),
            value.T,
            np.array(3),
            value.astype(bool),
            np.where(value == value, np.nan, np.nan),
        ]
    )
    if rng.random() < 0.2:
        del arrays[name]
    np.savez(path, **arrays)


def _edit_header(path: Path, rng: random.Random) -> None:
    """Another value in the header of a safetensors file."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    _edit(header, rng)
    new = json.dumps(header).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[8 + length :])


def _edit_table(path: Path, rng: random.Random) -> None:
    """Another value in one cell of a SQLite file, or a table less."""
    with sqlite3.connect(path) as sql:
        tables = [
            name
            for (name,) in sql.execute("SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")
        ]
        table = rng.choice([t for t in tables if not t.startswith("sqlite_")])
        if rng.random() < 0.1:
            sql.execute(f"DROP TABLE {table}")
            return
        columns = [row[1] for row in sql.execute(f"PRAGMA table_info({table})")]
        value = rng.choice([None, -1, 2**63 - 1, 1.5, "", "x", b"\xff\x00", "{}", "[]"])
        sql.execute(f"UPDATE {table} SET {rng.choice(columns)} = ?", (value,))
    sql.close()


_ANY = [_flip, _cut, _grow, _lose, _become_folder, _become_loop, _become_another]
_BY_SUFFIX = {
    ".json": [_edit_json],
    ".jsonl": [_edit_lines, _edit_record],
    ".csv": [_edit_lines, _edit_record],
    ".txt": [_edit_lines],
    ".toml": [_edit_lines, _edit_setting, _edit_setting],
    ".npz": [_edit_arrays],
    ".safetensors": [_edit_header],
    ".sqlite": [_edit_table],
}
