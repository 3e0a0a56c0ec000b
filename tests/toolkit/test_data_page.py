"""What docs/data.md tells people to type is typed, and a model of images is trained from a folder of them as from arrays."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from chats import threads, write_chats
from flat import train
from paths import DATA, ROOT
from typer.testing import CliRunner

from fleetune.device_runtime.commands.predict import predict
from fleetune.toolkit.cli import app
from fleetune.toolkit.export import export

LINES = re.findall(r"^    fleetune (.*)$", (ROOT / "docs" / "data.md").read_text(), flags=re.MULTILINE)
TABLES = {"mine.parquet", "saved"}


@pytest.fixture
def folder(word_artifact, word_file, tmp_path, monkeypatch):
    """An artifact, and the same samples in every form that the page speaks of."""
    shutil.copytree(word_artifact, tmp_path / "artifact")
    rows = list(csv.DictReader(word_file.open()))
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = word_file.read_text().replace("text,label", "utterance,intent")
    (tmp_path / "mine.csv").write_text(lines)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_tables(folder):
    pyarrow = pytest.importorskip(
        "pyarrow", reason="pyarrow is not installed: pip install 'fleetune[parquet]'"
    )
    from pyarrow import ipc, parquet

    rows = [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]
    names = ["c", "a", "b"]
    found = pyarrow.Table.from_pylist(rows)
    parquet.write_table(found, folder / "mine.parquet")
    (folder / "saved").mkdir()
    numbered = pyarrow.Table.from_pylist([{**row, "label": names.index(row["label"])} for row in rows])
    with ipc.new_stream(folder / "saved" / "data.arrow", numbered.schema) as writer:
        writer.write_table(numbered)
    info = {"features": {"label": {"names": names, "_type": "ClassLabel"}}}
    (folder / "saved" / "dataset_info.json").write_text(json.dumps(info))
    (folder / "saved" / "state.json").write_text('{"_data_files": [{"filename": "data.arrow"}]}')


def fleetune(line):
    done = CliRunner().invoke(app, line.split())
    assert done.exit_code == 0, done.output
    return done.output


def test_every_form_of_rows_trains_the_same_to_the_bit(folder):
    write_tables(folder)
    lines = [line for line in LINES if "--steps 4" in line and "chat" not in line]
    assert len(lines) == 3
    for line in lines:
        fleetune(f"{line} --threads 1")
    fleetune("train artifact --data mine.jsonl --steps 4 --out run-lines --threads 1")
    runs = [
        folder / name / "adapter" / "adapter_model.safetensors"
        for name in ("run-lines", "run", "run-parquet", "run-saved")
    ]
    assert len({path.read_bytes() for path in runs}) == 1


def test_the_example_of_chats_learns_answers(folder):
    (line,) = [line for line in LINES if "artifact-chat" in line]
    shutil.copytree(DATA / "chat_artifact", folder / "artifact-chat")
    write_chats(folder / "threads.jsonl", threads(50))
    assert "4 steps on 50 samples" in fleetune(f"{line} --threads 1")


def test_the_example_of_a_split_stops_or_ends(folder):
    (line,) = [line for line in LINES if "--eval-split" in line]
    said = fleetune(f"{line} --threads 1")
    assert "loss" in said
    report = json.loads((folder / "run-split" / "run.json").read_text())["report"]
    assert report["num_samples"] == 96
    assert report["evaluations"][-1][0] == report["steps"]


@pytest.fixture(scope="module")
def image_artifact(tmp_path_factory):
    """A small ViT with random weights, and the processor that came with it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("image")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.ViTConfig(image_size=16, patch_size=8, **sizes)
    transformers.ViTForImageClassification(config).save_pretrained(folder / "MODEL")
    transformers.ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(folder / "MODEL")
    export(folder / "MODEL", task="image-classification", labels=["dark", "light"], out=folder / "artifact")
    return folder / "artifact"


@pytest.mark.slow  # a model is exported
def test_a_folder_of_images_trains_as_its_arrays_do(image_artifact, tmp_path):
    Image = pytest.importorskip("PIL.Image")
    rng, pixels = np.random.default_rng(0), []
    for name, low in (("dark", 0), ("light", 128)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(8):
            image = rng.integers(low, low + 128, (16, 16, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / "photos" / name / f"{number}.png")
            pixels.append((image.astype(np.float64) / 255).astype(np.float32).transpose(2, 0, 1))
    np.savez(
        tmp_path / "a.npz",
        pixel_values=(np.stack(pixels) - np.float32(0.5)) / np.float32(0.5),
        labels=[0] * 8 + [1] * 8,
    )
    work = {"epochs": 12, "batch_size": 4, "lr": 0.02, "threads": 1}
    photos = train(
        image_artifact, data=tmp_path / "photos", out=tmp_path / "run", eval=tmp_path / "photos", **work
    )
    arrays = train(image_artifact, data=tmp_path / "a.npz", out=tmp_path / "again", **work)
    assert photos.losses == arrays.losses
    assert photos.accuracy == 1.0
    answers = predict(image_artifact, data=tmp_path / "photos", run=tmp_path / "run")
    assert [(a.text, a.label) for a in answers][7:9] == [("dark/7.png", "dark"), ("light/0.png", "light")]
