"""A model that hears is exported, and learns from a folder of recordings as from their values; one of spectra from arrays."""

import wave
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from flat import train

from fleetune.device_runtime.commands.predict import predict
from fleetune.device_runtime.commands.selfcheck import selfcheck
from fleetune.toolkit.export import export

pytestmark = pytest.mark.slow  # a model is exported
RATE, LENGTH = 8000, 800


def save(folder: Path, name: str, **sizes: object) -> Path:
    """A random model of two layers that tells three classes apart."""
    torch.manual_seed(0)
    shared = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = getattr(transformers, f"{name}Config")(num_labels=2, **shared, **sizes)
    kind = f"{name}ForAudioClassification" if name == "AST" else f"{name}ForSequenceClassification"
    getattr(transformers, kind)(config).save_pretrained(folder)
    return folder


def tones(folder: Path) -> np.ndarray:
    """Eight recordings of a low and eight of a high tone; their values as wav2vec's extractor makes them, (16, LENGTH)."""
    rng, rows = np.random.default_rng(0), []
    for name, hertz in (("high", 1500), ("low", 200)):
        (folder / name).mkdir(parents=True)
        for number in range(8):
            values = np.sin(2 * np.pi * hertz * np.arange(LENGTH) / RATE + rng.uniform(0, 6))
            whole = (values * rng.uniform(5000, 20000)).astype("<i2")
            with wave.open(str(folder / name / f"{number}.wav"), "wb") as file:
                file.setparams((1, 2, RATE, 0, "NONE", ""))
                file.writeframes(whole.tobytes())
            rows.append(whole.astype(np.float32) / 32768)
    extractor = transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE)
    found: np.ndarray = extractor(rows, sampling_rate=RATE, return_tensors="np")["input_values"]
    return found


def test_a_wav2vec_learns_tones_from_a_folder_of_recordings(tmp_path: Path) -> None:
    layers = {"conv_dim": (16, 16, 16), "conv_stride": (5, 4, 4), "conv_kernel": (10, 4, 4)}
    model = save(
        tmp_path / "MODEL",
        "Wav2Vec2",
        **layers,
        num_feat_extract_layers=3,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=16,
    )
    transformers.Wav2Vec2FeatureExtractor(sampling_rate=RATE).save_pretrained(model)
    artifact = tmp_path / "artifact"
    export(
        model,
        task="audio-classification",
        labels=["high", "low"],
        max_length=LENGTH,
        target_modules=["q_proj", "v_proj"],
        out=artifact,
    )
    assert selfcheck(artifact).ok
    values = tones(tmp_path / "sounds")
    np.savez(tmp_path / "a.npz", input_values=values, labels=[0] * 8 + [1] * 8)
    work = {"epochs": 15, "batch_size": 4, "lr": 0.02, "threads": 1}
    heard = train(artifact, data=tmp_path / "sounds", out=tmp_path / "run", eval=tmp_path / "sounds", **work)
    arrays = train(artifact, data=tmp_path / "a.npz", out=tmp_path / "again", **work)
    assert heard.losses == pytest.approx(arrays.losses, abs=1e-4)
    assert heard.accuracy == 1.0
    answers = predict(artifact, data=tmp_path / "sounds", run=tmp_path / "run")
    assert [(a.text, a.label) for a in answers][7:9] == [("high/7.wav", "high"), ("low/0.wav", "low")]


def test_a_spectrogram_transformer_takes_arrays_and_says_so(tmp_path: Path) -> None:
    model = save(tmp_path / "MODEL", "AST", max_length=64, num_mel_bins=32)
    notes: list[str] = []
    export(
        model,
        task="audio-classification",
        labels=["high", "low"],
        target_modules=["q_proj", "v_proj"],
        out=tmp_path / "artifact",
        on_note=notes.append,
    )
    assert any("spectra of 64 x 32" in note for note in notes)
    assert selfcheck(tmp_path / "artifact").ok
