import pytest
import transformers

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.errors import ConfigError, UnknownName
from fleetune.toolkit.benchmark import FOLDER, load
from fleetune.toolkit.models import packaged_model

subjects = load("measuring.subjects")


@pytest.fixture
def made(monkeypatch):
    """Workers that write a tiny model in the place of a large one; which ones ran."""
    ran = []

    def write(worker, *words, threads):
        *given, folder = words
        ran.append(" ".join([worker, *given]))
        shape = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 2}
        config = transformers.BertConfig(vocab_size=200, num_labels=77, **shape)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)

    monkeypatch.setattr(subjects, "run_worker", write)
    return ran


def test_every_subject_has_its_worker():
    workers = {subject.worker for subject in subjects.SUBJECTS.values()} - {""}
    assert all((FOLDER / "workers" / f"{worker}.py").is_file() for worker in workers)


def test_the_packaged_model_is_not_written_again(tmp_path, made):
    assert subjects.model_of("minilm", tmp_path) == packaged_model()
    assert made == []


def test_a_shape_is_asked_for_by_its_name(tmp_path, made):
    assert subjects.model_of("0.5b", tmp_path) == tmp_path / "0.5b-model"
    assert made == ["make_language_model 0.5b"]


@pytest.mark.slow  # a model is exported
def test_a_model_is_written_once_and_its_artifact_lies_beside_it(tmp_path, made):
    model = subjects.model_of("bert", tmp_path)
    assert model.parent == tmp_path
    lines = []
    artifact = open_artifact(subjects.artifact_of("bert", tmp_path, base_dtype="int8", say=lines.append))
    assert artifact.folder == tmp_path / "bert-int8"
    assert len(artifact.manifest.labels) == subjects.NUM_LABELS
    assert made == ["make_bert"]
    assert lines


def test_what_cannot_be_had_says_why(tmp_path, monkeypatch):
    with pytest.raises(UnknownName, match=r"no model 'gpt'; have: 0\.5b, 135m, bert, llama, minilm, stories"):
        subjects.model_of("gpt", tmp_path)

    def fail(*_, **__):
        raise ConfigError("there is no checkpoint")

    monkeypatch.setattr(subjects, "run_worker", fail)
    with pytest.raises(ConfigError, match="there is no checkpoint"):
        subjects.artifact_of("stories", tmp_path, say=print)
