"""The wire against committed files: a slip in a tag, a field or an order of bytes is seen here and nowhere else."""

import json
from hashlib import sha256

import golden_wire
import msgspec
import pytest
from golden_wire import FOLDER, MESSAGES, PAGE, PARTS, filled

from fleetune.device_runtime.contracts import wire
from fleetune.device_runtime.contracts.codecs import decode_update
from fleetune.device_runtime.contracts.transfer import Incoming

AGAIN = "python tests/support/golden_wire.py writes it again"
RECORDED = json.loads((FOLDER / "messages.json").read_text())
DIALOGUE = json.loads((FOLDER / "dialogue.json").read_text())


def test_every_message_is_recorded_and_no_other():
    assert RECORDED.keys() == {kind.__struct_config__.tag for kind in MESSAGES}


@pytest.mark.parametrize("tag", sorted(RECORDED))
def test_the_exact_bytes_of_every_message(tag):
    assert golden_wire.messages()[tag] == RECORDED[tag], AGAIN
    content = bytes.fromhex(RECORDED[tag]["bytes"])
    message = wire.decode(content)
    assert message == filled(type(message))
    assert type(message).__struct_config__.tag == tag


@pytest.mark.parametrize("kind", [*MESSAGES, *PARTS], ids=lambda kind: kind.__name__)
def test_every_field_is_set_in_what_is_recorded(kind):
    message = filled(kind)
    unset = [
        field.name
        for field in msgspec.structs.fields(kind)
        if field.name != "v" and not field.required and getattr(message, field.name) == field.default
    ]
    assert unset == []


def test_the_exact_bytes_of_a_round():
    assert golden_wire.dialogue() == DIALOGUE, AGAIN


def test_the_round_goes_as_it_is_told():
    said = [(line["from"], wire.decode(bytes.fromhex(line["bytes"]))) for line in DIALOGUE]
    kinds = [type(message).__name__ for _, message in said]
    assert [kind for kind in kinds if kind not in ("Request", "Chunk")] == [
        "Hello", "Offer", "UpdateReady", "Verdict",
    ]  # fmt: skip
    offer, update = (m for _, m in said if isinstance(m, wire.Offer | wire.UpdateReady))
    chunks = [m for _, m in said if isinstance(m, wire.Chunk)]
    content = {}
    for manifest in (offer.adapter, update.payload):
        incoming = Incoming(manifest, size_bytes_max=10**5)
        news = [incoming.add(chunk) for chunk in chunks if chunk.sha256 == manifest.sha256]
        content[manifest.sha256] = incoming.content()
        assert news.count(False) == (manifest is offer.adapter), "one chunk of the adapter came twice"
    assert sha256(golden_wire.adapter_file()).hexdigest() == offer.adapter.sha256
    values = decode_update(content[update.payload.sha256], {"w": golden_wire.np.zeros(600, "f4")})
    assert abs(values["w"][6] - 0.75) < 0.01


def test_the_field_tables_in_the_docs_are_current():
    assert PAGE.read_text() == golden_wire.page_with(golden_wire.field_tables()), AGAIN
