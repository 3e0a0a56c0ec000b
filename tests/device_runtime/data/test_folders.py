"""Folders by class are the arrays that their files stand for; a file that cannot be read is named."""

import json
import wave

import numpy as np
import pytest

from fleetune.device_runtime.contracts.artifact import PREPROCESSOR
from fleetune.device_runtime.contracts.manifest import FileDigest, Input
from fleetune.device_runtime.data.loading import load_dataset, read_texts
from fleetune.device_runtime.errors import ArtifactError, ConfigError, DataError

LABELS = Input("labels", "int64", ("batch",), role="labels")
PIXELS = (Input("pixel_values", "float32", ("batch", 3, 8, 8)), LABELS)
SOUND = (Input("input_values", "float32", ("batch", 400)), LABELS)
IMAGES = {
    "size": {"height": 8, "width": 8},
    "resample": 2,
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.5, 0.3, 0.2],
}
RATE = {"sampling_rate": 8000, "feature_size": 1}
CLASSES = ("sad", "glad", "mad")


@pytest.fixture
def load(tmp_path, make_manifest):
    def load_folder(path, inputs=PIXELS, config=IMAGES, labelled=True, **changes):
        (tmp_path / PREPROCESSOR).write_text(json.dumps(config))
        files = {PREPROCESSOR: FileDigest("", 0)} if config else {}
        manifest = make_manifest(
            inputs=inputs, task="image-classification", tokenizer=None, files=files, **changes
        )
        return load_dataset(path, manifest, tmp_path, seq_len=16, labelled=labelled)

    return load_folder


def image(rng, width=12, height=9, mode="RGB"):
    Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed: pip install 'fleetune[images]'")
    channels = {"RGB": (3,), "L": (), "RGBA": (4,)}[mode]
    return Image.fromarray(rng.integers(0, 256, (height, width, *channels), np.uint8), mode)


def write_images(folder, rng=None, names=("glad", "mad", "sad")):
    rng = rng or np.random.default_rng(0)
    for name in names:
        (folder / name).mkdir(parents=True)
        for number in range(2):
            image(rng).save(folder / name / f"{number}.png")
    (folder / ".hidden").mkdir()
    (folder / names[0] / ".DS_Store").write_bytes(b"x")
    return folder


def write_wav(path, values, rate=8000, channels=1, width=2):
    path.parent.mkdir(parents=True, exist_ok=True)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(channels), file.setsampwidth(width), file.setframerate(rate)
        file.writeframes(np.asarray(values, f"<i{width}").tobytes())
    return path


def write_sound(folder):
    rng = np.random.default_rng(1)
    for name in CLASSES:
        write_wav(folder / name / "a.wav", rng.integers(-30000, 30000, 300))
    return folder


def test_a_folder_of_images_is_the_same_as_its_arrays(load, tmp_path):
    folder = write_images(tmp_path / "data")
    from PIL import Image

    paths = [folder / name / f"{n}.png" for name in ("glad", "mad", "sad") for n in range(2)]
    pixels = np.stack([np.asarray(Image.open(p).resize((8, 8), 2)).transpose(2, 0, 1) for p in paths])
    scaled = (pixels.astype(np.float64) / 255).astype(np.float32)
    mean, std = (np.float32(IMAGES[name])[:, None, None] for name in ("image_mean", "image_std"))
    np.savez(tmp_path / "a.npz", pixel_values=(scaled - mean) / std, labels=[1, 1, 2, 2, 0, 0])
    assert load(folder).digest == load(tmp_path / "a.npz").digest
    assert read_texts(folder)[:3] == ["glad/0.png", "glad/1.png", "mad/0.png"]
    assert load(folder, labelled=False).labels.size == 0


@pytest.mark.parametrize(
    "config",
    [
        {"size": {"height": 8, "width": 8}, "resample": 3},
        {
            "size": {"shortest_edge": 10},
            "crop_size": {"height": 8, "width": 8},
            "do_center_crop": True,
            "do_resize": True,
        },
        {"size": {"shortest_edge": 7}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True},
        {"size": {"height": 8, "width": 8}, "do_normalize": False, "resample": 0},
    ],
    ids=["square", "cropped", "cropped beyond", "as it is"],
)
def test_images_are_what_transformers_makes_of_them(load, tmp_path, config):
    pytest.importorskip("torch")
    from transformers import ViTImageProcessorPil

    whole = {**IMAGES, "resample": 2, **config}
    folder = write_images(tmp_path / "data")
    image(np.random.default_rng(5), width=7, height=20).save(folder / "sad" / "9.png")
    found = load(folder, config=whole)
    from PIL import Image

    images = [Image.open(folder / name) for name in read_texts(folder)]
    expected = ViTImageProcessorPil(**whole)(images, return_tensors="np")["pixel_values"]
    assert np.array_equal(found.rows(np.arange(7))["pixel_values"], expected)


def test_images_of_other_modes_are_read_upright(load, tmp_path):
    from PIL import Image

    rng, folder = np.random.default_rng(2), write_images(tmp_path / "data")
    upright = image(rng)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    upright.transpose(Image.Transpose.ROTATE_90).save(folder / "glad" / "0.png", exif=exif)
    upright.save(folder / "glad" / "1.png")
    image(rng, mode="L").save(folder / "mad" / "0.png")
    image(rng, mode="RGBA").save(folder / "mad" / "1.png")
    pixels = load(folder).rows(np.arange(6))["pixel_values"]
    assert np.array_equal(pixels[0], pixels[1])


def test_a_bad_image_is_named(load, tmp_path):
    folder = write_images(tmp_path / "data")
    bad = folder / "mad" / "1.png"
    whole = bad.read_bytes()
    for content in (b"", whole[:60], b"not an image", whole[:-30]):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"data/mad/1\.png: not a whole image: .*; replace or remove it$"):
            load(folder)
    huge = bytearray(whole)
    huge[16:24] = b"\x00\x00\x40\x00" * 2  # width and height
    from zlib import crc32

    huge[29:33] = crc32(bytes(huge[12:29])).to_bytes(4, "big")
    bad.write_bytes(huge)
    with pytest.raises(DataError, match=r"mad/1\.png: .*(pixels|bomb)"):
        load(folder)


def test_a_folder_without_classes_says_what_it_should_be(load, tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(
        DataError, match=r"data: expected a folder for each class, found none; have classes: sad, glad, mad"
    ):
        load(tmp_path / "data")
    write_images(tmp_path / "one", names=("glad",))
    with pytest.raises(DataError, match=r"found one alone, glad; .*an empty one"):
        load(tmp_path / "one")
    (tmp_path / "one" / "mad").mkdir()
    assert load(tmp_path / "one").labels.tolist() == [1, 1]
    (tmp_path / "one" / "bad").mkdir()
    with pytest.raises(DataError, match="one, folder 1: no label 'bad'; have: sad, glad, mad"):
        load(tmp_path / "one")
    for name in CLASSES:
        (tmp_path / "empty" / name).mkdir(parents=True)
    with pytest.raises(DataError, match="empty: no file in the folder"):
        load(tmp_path / "empty")


def test_what_the_artifact_does_not_say_is_not_guessed(load, tmp_path):
    folder = write_images(tmp_path / "data")
    for config, message in (
        (
            {},
            "does not say how files are read; put the model's preprocessor_config.json beside it and export",
        ),
        ({**IMAGES, "crop_pct": 0.9}, "crop_pct is not followed here"),
        ({**IMAGES, "image_std": [0.5, 0, 1]}, "image_std 0"),
        ({**IMAGES, "image_mean": [0.5]}, "image_mean has 1 values, the model 3 channels"),
        (
            {**IMAGES, "size": {"height": 9, "width": 8}},
            r"makes \[3, 9, 8\] of 0.png, the model takes \[3, 8, 8\]",
        ),
        ({**IMAGES, "size": {"height": 0, "width": 8}}, "size and crop_size: expected 1 to 10000"),
        ({**IMAGES, "size": {"longest_edge": 8}}, "expected height and width, or shortest_edge"),
        ({**IMAGES, "resample": 9}, "resample 9: expected 0 to 5"),
        ({**IMAGES, "do_normalize": True, "image_std": None}, "no image_mean or image_std"),
        ({**IMAGES, "size": "x"}, "cannot be read"),
    ):
        with pytest.raises(ArtifactError, match=message):
            load(folder, config=config)


def test_a_model_that_takes_neither_pixels_nor_sound_takes_no_folder(load, tmp_path):
    with pytest.raises(DataError, match=r"neither pixels .* nor sound"):
        load(write_images(tmp_path / "data"), inputs=(Input("mfcc", "float32", ("batch", 98, 40)), LABELS))


def test_a_folder_of_recordings_is_the_same_as_its_arrays(load, tmp_path):
    folder = tmp_path / "data"
    short, long = np.arange(-300, 300, 2), np.arange(500)
    write_wav(folder / "glad" / "a.wav", short)
    write_wav(folder / "sad" / "b.wav", np.stack([long, long + 2], 1), channels=2)
    values = np.zeros((2, 400), np.float32)
    values[0, :300], values[1] = short / 32768, (long[:400] + 1) / 32768
    np.savez(tmp_path / "a.npz", input_values=values, labels=[1, 0])
    found = load(folder, SOUND, RATE)
    assert found.digest == load(tmp_path / "a.npz", SOUND, RATE).digest
    assert "1 of 2 samples are longer than 400 values" in str(found.cut)


def test_eight_bits_stand_around_the_middle(load, tmp_path):
    for name, values in (("glad", [0, 128, 255]), ("sad", [64, 192, 128])):
        write_wav(tmp_path / "data" / name / "a.wav", np.array(values, np.uint8).view(np.int8), width=1)
    found = load(tmp_path / "data", SOUND, RATE).rows(np.arange(2))["input_values"]
    assert found[0, :3].tolist() == [-1, 0, 127 / 128]
    assert found[1, :3].tolist() == [-0.5, 0.5, 0]


def test_sound_is_normalised_as_transformers_does(load, tmp_path):
    pytest.importorskip("torch")
    from transformers import Wav2Vec2FeatureExtractor

    folder = write_sound(tmp_path / "data")
    found = load(folder, SOUND, RATE | {"do_normalize": True}).rows(np.arange(3))["input_values"]
    heard = []
    for name in read_texts(folder):
        with wave.open(str(folder / name)) as file:
            heard.append(np.frombuffer(file.readframes(300), "<i2").astype(np.float32) / 32768)
    extractor = Wav2Vec2FeatureExtractor(sampling_rate=8000, return_attention_mask=True)
    expected = extractor(heard, sampling_rate=8000, padding="max_length", max_length=400, return_tensors="np")
    assert np.abs(found - expected["input_values"]).max() < 1e-6


def test_other_forms_of_sound_are_read_by_the_library(load, tmp_path):
    soundfile = pytest.importorskip(
        "soundfile", reason="soundfile is not installed: pip install 'fleetune[audio]'"
    )
    folder = write_sound(tmp_path / "data")
    usual = load(folder, SOUND, RATE).digest
    for name in CLASSES:
        path = folder / name / "a.wav"
        values, rate = soundfile.read(path, dtype="int16")
        path.unlink()
        soundfile.write(folder / name / "a.flac", values, rate)
    assert load(folder, SOUND, RATE).digest == usual
    for name in CLASSES:
        values, rate = soundfile.read(folder / name / "a.flac", dtype="float32")
        (folder / name / "a.flac").unlink()
        soundfile.write(folder / name / "a.wav", values, rate, subtype="FLOAT")
    assert load(folder, SOUND, RATE).digest == usual


def test_a_bad_recording_is_named(load, tmp_path):
    folder = write_sound(tmp_path / "data")
    bad = folder / "mad" / "a.wav"
    whole = bad.read_bytes()
    for content in (b"", b"RIFF", whole[:30], whole[:-100], whole[:44]):
        bad.write_bytes(content)
        with pytest.raises(DataError, match=r"mad/a\.wav: .*; replace or remove it$"):
            load(folder, SOUND, RATE)
    write_wav(bad, range(100), rate=44100)
    with pytest.raises(
        DataError, match="44100 values a second, the model takes 8000; resample it, as `ffmpeg"
    ):
        load(folder, SOUND, RATE)
    with pytest.raises(ArtifactError, match="says no sampling_rate"):
        load(folder, SOUND, {"sampling_rate": 0})


def test_without_their_libraries_files_say_which_extra_to_install(load, tmp_path, monkeypatch):
    folder, images = write_sound(tmp_path / "sound"), write_images(tmp_path / "images")
    for name in ("PIL", "PIL.Image", "soundfile"):
        monkeypatch.setitem(__import__("sys").modules, name, None)
    (folder / "mad" / "b.flac").write_bytes(b"fLaC")
    with pytest.raises(
        ConfigError, match=r"mad/b\.flac needs soundfile; run: pip install 'fleetune\[audio\]'"
    ):
        load(folder, SOUND, RATE)
    with pytest.raises(ConfigError, match=r"pip install 'fleetune\[images\]'"):
        load(images)
