"""Damages content as a failing card, a hurried editor or a hostile sender would: bytes in, bytes out, all drawn from ``rng``."""

import copy
import gzip
import io
import json
import sqlite3
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec

Mutation = Callable[[bytes, Random], bytes]
STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1, 3.5, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, -(2**63), 1e308, -0.0, "", " ", "job", "V9",
    "float32", "int8", "batch", "labels", "\0", "\x1b[31m", "../x", "/", "x" * 3000, [], {}, [[]], [0], [0, 2**63],
    [2**62, 2**62],     [-1], {"a": 1}, {"": None}, [[[[[[[[]]]]]]]],
)  # fmt: skip
_NUMBERS = (
    b"\xff" * 8,
    b"\xff" * 4,
    b"\x7f" + b"\xff" * 7,
    b"\x80" + b"\0" * 7,
    b"\0" * 8,
    b"\xcb\x7f\xf0\0\0\0\0\0\0",
)


def of_bytes(content: bytes, rng: Random) -> bytes:
    """Change, cut out, put in or double some bytes; seldom lose the end."""
    out = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4, 8))):
        place, kind = rng.randrange(len(out) + 1), rng.random()
        other = rng.choice(_NUMBERS) if rng.random() < 0.2 else rng.randbytes(rng.choice((1, 1, 1, 2, 8)))
        if kind < 0.5:
            out[place : place + len(other)] = other
        elif kind < 0.65:
            out[place:place] = other
        elif kind < 0.8:
            del out[place : place + rng.choice((1, 2, 8, 100))]
        elif kind < 0.95:
            out[place:place] = out[rng.randrange(len(out) + 1) :][: rng.choice((1, 8, 64))]
        else:
            del out[place:]
    return bytes(out)


def of_tree(tree: Any, rng: Random) -> Any:
    """Replace, remove or double one value somewhere in nested lists and dictionaries, in place."""
    at = tree
    while isinstance(at, (dict, list)) and at:
        key = rng.choice(list(at) if isinstance(at, dict) else range(len(at)))
        if isinstance(at[key], (dict, list)) and at[key] and rng.random() < 0.85:
            at = at[key]
            continue
        kind = rng.random()
        if kind < 0.15:
            del at[key]
        elif kind < 0.25:
            at.append(copy.deepcopy(at[key])) if isinstance(at, list) else at.update({f"{key}_": at[key]})
        elif kind < 0.4 and isinstance(at[key], (int, float)) and not isinstance(at[key], bool):
            at[key] += rng.choice((1, -1, 2**32, -1e300))
        elif kind < 0.5 and isinstance(at[key], (str, bytes)):
            at[key] = at[key][: rng.randrange(len(at[key]) + 1)]
        else:
            at[key] = copy.deepcopy(rng.choice(STRANGE))
        break
    return tree


def of_json(content: bytes, rng: Random) -> bytes:
    """Another value in a JSON file, or damaged bytes."""
    if rng.random() < 0.3:
        return of_bytes(content, rng)
    tree = json.loads(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = of_tree(tree, rng)
    return json.dumps(tree).encode()


def of_msgpack(content: bytes, rng: Random) -> bytes:
    """Another value in a MessagePack object, or damaged bytes."""
    if rng.random() < 0.4:
        return of_bytes(content, rng)
    tree = msgspec.msgpack.decode(content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        tree = of_tree(tree, rng)
    try:
        return msgspec.msgpack.encode(tree)
    except (OverflowError, msgspec.MsgspecError, ValueError):
        return of_bytes(content, rng)


def of_lines(content: bytes, rng: Random) -> bytes:
    """Lines of JSON or CSV with a value, a line or bytes changed."""
    if rng.random() < 0.4:
        return of_bytes(content, rng)
    lines = content.splitlines()
    place = rng.randrange(len(lines))
    if lines[place].startswith(b"{") and rng.random() < 0.7:
        lines[place] = of_json(lines[place], rng)
    else:
        odd = (
            b"",
            b"\xff\xfe",
            b"\0",
            b'"',
            b"a,b,c,d",
            b"[]",
            b"{}",
            b"[" * 5000,
            b"9" * 5000,
            b"\xef\xbb\xbf",
            b"\r",
            b'{"text": "\\ud800", "label": 0}',
        )
        lines[place:place] = [rng.choice((*odd, lines[place]))]
    text = rng.choice((b"\n", b"\n", b"\r\n", b"\r")).join(lines)
    wide = rng.random()
    return text.decode(errors="replace").encode("utf-16") if wide < 0.05 else text


def of_toml(content: bytes, rng: Random) -> bytes:
    """Another value behind one ``=``, a line more, or damaged bytes."""
    if rng.random() < 0.3:
        return of_bytes(content, rng)
    lines = content.splitlines()
    values = (b"-1", b"0", b"nan", b"inf", b"1e400", b"9" * 30, b'""', b'"x"', b"[]", b"[[]]", b"{}", b"{ a = 1 }", b"true",
              b"1979-05-27",
              b"07:32:00", b'"\\u0000"', b"[" * 3000, b"0x" + b"f" * 200)  # fmt: skip
    place = rng.randrange(len(lines))
    if b"=" in lines[place] and rng.random() < 0.8:
        lines[place] = lines[place].split(b"=")[0] + b"= " + rng.choice(values)
    else:
        lines[place:place] = [
            rng.choice((b"x = 1", b"[x]", b"[[x]]", b"[x.y]", b"a.b = 1", b"= 1", b"[" * 3000, *lines))
        ]
    return b"\n".join(lines) + b"\n"


def of_header(content: bytes, rng: Random) -> bytes:
    """Another value in the header of a safetensors file, a JSON inside of it included, or damaged bytes."""
    if rng.random() < 0.3:
        head = min(len(content), 400) if rng.random() < 0.5 else len(content)
        return of_bytes(content[:head], rng) + content[head:]
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    said = header.get("__metadata__", {})
    if said and rng.random() < 0.6:
        name = rng.choice(sorted(said))
        said[name] = (
            of_json(said[name].encode(), rng).decode(errors="replace")
            if said[name][:1] == "{"
            else rng.choice(("", "x", "0" * 64))
        )
    else:
        header = of_tree(header, rng)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + size :]


def of_npz(content: bytes, rng: Random) -> bytes:
    """Members of a zip changed, swapped, doubled or made enormous, or damaged bytes."""
    if rng.random() < 0.4:
        return of_bytes(content, rng)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = rng.choice(sorted(members))
    kind = rng.random()
    if kind < 0.6:
        members[name] = _of_npy(members[name], rng)
    elif kind < 0.75:
        members[name] = members[rng.choice(sorted(members))]
    elif kind < 0.85:
        del members[name]
    else:
        members[rng.choice(("x.npy", "../x.npy", "readme", "labels", "/etc/passwd.npy"))] = of_bytes(
            members[name], rng
        )
    out = io.BytesIO()
    with zipfile.ZipFile(
        out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))
    ) as archive:
        for one, data in members.items():
            archive.writestr(one, data)
    return out.getvalue()


def _of_npy(content: bytes, rng: Random) -> bytes:
    head = content[10 : 10 + int.from_bytes(content[8:10], "little")]
    shape = rng.choice(
        (
            "()",
            "(0,)",
            "(1,)",
            "(-1,)",
            "(4, 6)",
            "(2**40,)",
            "(1000000000000,)",
            "(4, 6, 1)",
            "(" + "1," * 40 + ")",
            "x",
            "(9223372036854775807, 8)",
        )
    )
    dtype = rng.choice(
        (
            "<i8",
            "<i4",
            "|O",
            "|S9",
            "<U3",
            "<f8",
            ">i8",
            "|b1",
            "V9",
            "<c16",
            "<M8[ns]",
            "[('a', '<i4')]",
            "i",
            "<i99",
            "," * 50,
        )
    )
    said = rng.choice((
        f"{{'descr': '{dtype}', 'fortran_order': {rng.choice((True, False, 2, None))}, 'shape': {shape}, }}".encode(),
        of_bytes(head, rng),
        b"(" * 3000 + b")" * 3000,
        b"{'descr': '<i8', 'fortran_order': False, 'shape': (4, 6), }",
    ))  # fmt: skip
    version = rng.choice((b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"))
    size = len(said).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return content[:6] + version + size + said + content[10 + len(head) :]


def of_gzip(inner: Mutation) -> Mutation:
    """What ``inner`` makes, packed; or the packed bytes damaged; or, seldom, a few bytes that unpack to a great many."""

    def mutate(content: bytes, rng: Random) -> bytes:
        kind = rng.random()
        if kind < 0.002:
            return bomb(rng.choice(BOMBS))
        return (
            gzip.compress(inner(gzip.decompress(content), rng), 1, mtime=0)
            if kind < 0.5
            else of_bytes(content, rng)
        )

    return mutate


BOMBS = (
    (b'{"text": "red", "label": "a"}\n', 1 << 20),
    (b"x", 1 << 26),
    (b"\n", 1 << 25),
    (b"[", 1 << 24),
    (b'text,label\n"red,', 1 << 22),
    (b"a,", 1 << 23),
)
"""What a small file unpacks to: these bytes, so many times."""
_bombs: dict[tuple[bytes, int], bytes] = {}


def bomb(of: tuple[bytes, int]) -> bytes:
    if of not in _bombs:
        piece, count = of
        block, out = piece * (count // 64), io.BytesIO()
        with gzip.GzipFile(fileobj=out, mode="wb", compresslevel=6, mtime=0) as file:
            for _ in range(64):
                file.write(block)
        _bombs[of] = out.getvalue()
    return _bombs[of]


def of_sqlite(scratch: Path) -> Mutation:
    """Another value in a cell, a row or table less, or damaged bytes; ``scratch`` is a file for it to be done in."""

    def mutate(content: bytes, rng: Random) -> bytes:
        if rng.random() < 0.4:
            return of_bytes(content, rng)
        scratch.write_bytes(content)
        sql = sqlite3.connect(scratch)
        try:
            with sql:
                sql.execute("PRAGMA synchronous = OFF")
                sql.execute("PRAGMA journal_mode = OFF")
                _spoil_rows(sql, rng)
        except (sqlite3.Error, OverflowError, UnicodeDecodeError):
            return of_bytes(content, rng)
        finally:
            sql.close()
        return scratch.read_bytes()

    return mutate


def _spoil_rows(sql: sqlite3.Connection, rng: Random) -> None:
    found = sql.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND name NOT LIKE 'sqlite%' ORDER BY name"
    )
    table = rng.choice([name for (name,) in found])
    kind = rng.random()
    if kind < 0.05:
        sql.execute(f"DROP TABLE {table}")
        return
    columns = [row[1] for row in sql.execute(f"PRAGMA table_info({table})")]
    if kind < 0.1:
        sql.execute(f"ALTER TABLE {table} RENAME COLUMN {rng.choice(columns)} TO x")
        return
    keys = sql.execute(f"SELECT {columns[0]} FROM {table}").fetchall()
    if not keys or kind < 0.15:
        sql.execute(f"DELETE FROM {table} WHERE {columns[0]} = ?", rng.choice(keys or [(0,)]))
        return
    column, key = rng.choice(columns), rng.choice(keys)
    (old,) = sql.execute(f"SELECT {column} FROM {table} WHERE {columns[0]} IS ?", key).fetchone()
    sql.execute(f"UPDATE {table} SET {column} = ? WHERE {columns[0]} IS ?", (_other(old, rng), *key))


def _other(old: Any, rng: Random) -> Any:
    """Another value for a cell: of text that is JSON, and of bytes, with something changed in it."""
    values = (
        None,
        -1,
        0,
        1,
        2**31,
        2**63 - 1,
        -(2**63),
        1.5,
        1e308,
        float("inf"),
        "",
        "x",
        "x" * 5000,
        "\x1b[1m",
        b"\xff\x00",
        b"",
        "{}",
        "[]",
    )
    if isinstance(old, str) and old[:1] == "{" and rng.random() < 0.7:
        return of_json(old.encode(), rng).decode(errors="replace")
    if isinstance(old, bytes) and old and rng.random() < 0.7:
        return of_bytes(old, rng)
    return rng.choice(values)
