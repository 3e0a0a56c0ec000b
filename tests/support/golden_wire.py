"""The wire as committed files, for other languages and against slips; `python tests/support/golden_wire.py` writes them.

``tests/data/wire/messages.json``: every message with every field set, and its bytes. ``tests/data/wire/dialogue.json``: one
round between a device and an aggregator, a chunk lost on the way. And the tables of fields in ``docs/protocol.md``.
"""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec
import numpy as np
from paths import ROOT

from fleetune.device_runtime.contracts import fields, mask_messages, wire, work
from fleetune.device_runtime.contracts.codecs import encode_update
from fleetune.device_runtime.contracts.pull import Pull
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.options import Field, Option, fields_of

FOLDER = ROOT / "tests" / "data" / "wire"
PAGE = ROOT / "docs" / "protocol.md"
BEGIN = "<!-- fields: written by tests/support/golden_wire.py -->"
END = "<!-- end of fields -->"
MESSAGES: tuple[type[msgspec.Struct], ...] = get_args(wire.Message)
_SHARES = ("accuracy", "down_ratio")
_SMALL = {"bits": 16, "weight_bits": 10, "left_out": {"device-1": 7}, "pending": ["device-1"]} | {
    name: bytes(range(32)) for name in ("mask_key", "share_key", "seed_digest")
}
"""Values of fields that take no others."""
PARTS = (
    wire.TransferManifest,
    wire.RoundFigures,
    work.LocalWork,
    work.PolicySpec,
    work.OptimizerSpec,
    work.SumGrid,
    mask_messages.MaskPeer,
    mask_messages.MaskShare,
)


def filled(kind: type[msgspec.Struct]) -> Any:
    """A struct with every field set, none to its default; the same at every call."""
    values = {f.name: _value(f, place) for place, f in enumerate(fields_of(kind))}
    return kind(**values | ({"v": fields.VERSION} if "v" in values else {}))


def _value(field: Field, place: int) -> Any:
    if isinstance(field.type, type) and issubclass(field.type, msgspec.Struct):
        return filled(field.type)
    if field.type is bool:
        return field.default is not True
    inner = get_args(field.type)[-1:]
    if get_origin(field.type) is list and isinstance(inner[0], type) and issubclass(inner[0], msgspec.Struct):
        return [filled(inner[0])]
    if field.name in _SMALL:
        return _SMALL[field.name]
    known = {
        int: 1000 + place,
        float: place + 0.25 if field.name not in _SHARES else 0.25,
        str: field.name.replace("_", "-"),
        bytes: field.name.encode(),
        dict: {"loss": 0.5},
        list: [place, 0],
    }
    return known[get_origin(field.type) or field.type]


def messages() -> dict[str, dict[str, Any]]:
    """Fields and bytes of every message, by type."""
    made = [filled(kind) for kind in MESSAGES]
    return {
        _tag(type(m)): {"fields": _readable(m), "bytes": wire.encode(m).hex()}
        for m in sorted(made, key=lambda m: _tag(type(m)))
    }


def dialogue() -> list[dict[str, str]]:
    """One round: offer, adapter, update, verdict; the second chunk of the adapter is lost once."""
    return [
        {"from": who, "type": _tag(type(message)), "bytes": wire.encode(message).hex()}
        for who, message in _dialogue()
    ]


def _dialogue() -> Iterator[tuple[str, Any]]:
    adapter = Outgoing(adapter_file(), chunk_bytes=500)
    held = {"w": np.zeros(600, np.float32)}
    moved = {"w": (np.arange(600) % 7 / 8).astype(np.float32)}
    update = Outgoing(encode_update("int8", moved, held), chunk_bytes=500)
    names = {"device_id": "device-1", "job": "job"}
    yield "device", wire.Hello(device_id="device-1", artifact="a" * 64, num_samples=64)
    yield (
        "aggregator",
        _with(wire.Offer, job="job", round=1, version=0, adapter=adapter.manifest, deadline_s=600.0),
    )
    yield from _transfer("device", "aggregator", adapter, lost={1})
    yield (
        "device",
        _with(wire.UpdateReady, **names, round=1, version=0, payload=update.manifest, codec="int8"),
    )
    yield from _transfer("aggregator", "device", update, lost=set())
    yield "aggregator", wire.Verdict(job="job", round=1, digest=update.manifest.sha256, accepted=True)


def _with(kind: type[msgspec.Struct], **values: Any) -> Any:
    """A message with these fields; others that it must have are filled, those that it may have are left out."""
    required = {f.name for f in msgspec.structs.fields(kind) if f.required}
    must = {f.name: _value(f, i) for i, f in enumerate(fields_of(kind)) if f.name in required}
    return kind(**must | values)


def _transfer(puller: str, server: str, outgoing: Outgoing, *, lost: set[int]) -> Iterator[tuple[str, Any]]:
    pull, now = Pull(outgoing.manifest, size_bytes_max=10**6, now=0.0), 0.0
    while not pull.done:
        if request := pull.due(now):
            yield puller, request
            for chunk in outgoing.chunks(request):
                yield server, chunk
                if chunk.index not in lost:
                    pull.add(chunk, now)
            lost = set()
        now += 10.0


def adapter_file() -> bytes:
    """A safetensors file of one tensor ``w``, float32 (600,), all zero; by hand, so that no library decides its bytes."""
    header = b'{"w":{"dtype":"F32","shape":[600],"data_offsets":[0,2400]}}'
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + bytes(2400)


def field_tables() -> str:
    """The tables of fields, as Markdown."""
    meanings = _meanings()
    return "\n".join(_table(kind, meanings[kind.__name__]) for kind in (*MESSAGES, *PARTS))


def _table(kind: type[msgspec.Struct], meanings: dict[str, str]) -> str:
    tag = kind.__struct_config__.tag
    title = f"`{tag}`: {kind.__name__}" if tag else f"{kind.__name__}, inside others"
    lines = [f"\n### {title}\n", "| field | type | bounds | if absent | meaning |", "|---|---|---|---|---|"]
    options = {field.name: field.option for field in fields_of(kind)}
    for field in msgspec.structs.fields(kind):
        meaning = meanings[field.name] or options[field.name].help
        bounds = ", ".join(_bounds(field.type))
        lines.append(
            f"| `{field.name}` | {_type_name(field.type)} | {bounds} | {_default(field)} | {meaning} |"
        )
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _type_name(get_args(annotation)[0])
    if get_origin(annotation) in (dict, list):
        return f"{get_origin(annotation).__name__}[{', '.join(map(_type_name, get_args(annotation)))}]"
    return str(annotation.__name__)


def _bounds(annotation: Any) -> Iterator[str]:
    """What a field's value must keep to: by the decoder (Meta), by the law of an option, or by being cut (Shown)."""
    if get_origin(annotation) is not Annotated:
        return
    bare, *notes = get_args(annotation)
    unit = {str: "characters", bytes: "bytes"}.get(bare, "entries")
    for note in notes:
        if isinstance(note, fields.Shown):
            yield f"cut to {note.chars_max} characters"
        if isinstance(note, msgspec.Meta) and note.le is not None:
            yield f"{note.ge} to {note.le:.10g}"
        if isinstance(note, msgspec.Meta) and note.max_length is not None and note.min_length:
            yield f"exactly {note.max_length} {unit}"
        elif isinstance(note, msgspec.Meta) and note.max_length is not None:
            yield f"{note.max_length} {unit}"
        if isinstance(note, Option):
            laws = {
                "at least": note.at_least,
                "above": note.above,
                "below": note.below,
                "at most": note.at_most,
            }
            yield from (f"{words} {value:.10g}" for words, value in laws.items() if value is not None)


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "refused"
    default = field.default if field.default is not msgspec.NODEFAULT else field.default_factory()
    if isinstance(default, bytes):
        return "no bytes"
    return "its defaults" if isinstance(default, msgspec.Struct) else f"`{json.dumps(default)}`"


def _meanings() -> dict[str, dict[str, str]]:
    """Meaning of every field, from the source: a field's docstring is the string that follows it."""
    trees = [ast.parse(Path(str(module.__file__)).read_text()) for module in (wire, mask_messages, work)]
    return {c.name: dict(_fields(c.body)) for tree in trees for c in tree.body if isinstance(c, ast.ClassDef)}


def _fields(body: list[ast.stmt]) -> Iterator[tuple[str, str]]:
    for statement, following in zip(body, [*body[1:], None], strict=True):
        if isinstance(statement, ast.AnnAssign) and isinstance(statement.target, ast.Name):
            said = following.value.value if _is_text(following) else ""  # type: ignore[union-attr]
            yield statement.target.id, re.sub(r":\w+:`(\w+)`", r"``\1``", " ".join(said.split()))


def _is_text(statement: ast.stmt | None) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _tag(kind: type[msgspec.Struct]) -> str:
    return str(kind.__struct_config__.tag)


def _readable(value: Any) -> Any:
    if isinstance(value, msgspec.Struct):
        return {name: _readable(getattr(value, name)) for name in value.__struct_fields__}
    if isinstance(value, list):
        return [_readable(one) for one in value]
    return {"hex": value.hex()} if isinstance(value, bytes) else value


def page_with(tables: str) -> str:
    """docs/protocol.md with ``tables`` in their place."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n\n{END}{rest.partition(END)[2]}"


def main() -> None:
    """Write the files and the tables."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, content in {"messages": messages(), "dialogue": dialogue()}.items():
        (FOLDER / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    PAGE.write_text(page_with(field_tables()))


if __name__ == "__main__":
    main()
