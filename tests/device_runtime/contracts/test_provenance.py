import pytest

from fleetune.device_runtime.contracts.manifest import Origin
from fleetune.device_runtime.contracts.provenance import (
    Provenance,
    adapter_card,
    merged_card,
    provenance_of,
    read_provenance,
    write_provenance,
)
from fleetune.device_runtime.errors import ArtifactError

KNOWN = Provenance(
    task="sequence-classification",
    architecture="BertForSequenceClassification",
    labels=("on", 'the "other"'),
    model="org/name",
    licence="mit",
    origin=Origin("hub", "ab", 3),
    tensors={"a": (2, 3)},
)


def test_what_is_written_comes_back(tmp_path, make_manifest):
    assert read_provenance(tmp_path) == Provenance()
    write_provenance(tmp_path, KNOWN, card="words")
    assert read_provenance(tmp_path) == KNOWN
    manifest = make_manifest()
    assert provenance_of(manifest).tensors == {t.name: t.shape for t in manifest.trainable}
    (tmp_path / "fleetune.json").write_text("[]")
    with pytest.raises(ArtifactError, match=r"fleetune\.json: cannot be read"):
        read_provenance(tmp_path)


def test_a_card_says_task_labels_and_licence_and_how_the_adapter_is_loaded():
    card = adapter_card(KNOWN)
    for words in ('base_model: "org/name"', 'pipeline_tag: "text-classification"', "model: mit", "1 `the"):
        assert words in card
    compile(card.split("```python\n")[1].split("```")[0], "card", "exec")
    assert 'base_model: "org/name"' in merged_card(KNOWN)


def test_a_folder_is_no_base_model_of_the_hub():
    local = Provenance(model="/home/someone/minilm", origin=Origin("folder"))
    assert "base_model:" not in adapter_card(local)
    assert "```python" in adapter_card(Provenance())
