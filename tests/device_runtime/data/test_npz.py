import tracemalloc
import zipfile

import numpy as np
import pytest

from fleetune.device_runtime.contracts.manifest import Input
from fleetune.device_runtime.contracts.manifest import Tokenizer as ManifestTokenizer
from fleetune.device_runtime.errors import DataError

PIXELS = (
    Input("pixel_values", "float32", ("batch", 2, 4)),
    Input("labels", "int64", ("batch",), role="labels"),
)


@pytest.fixture
def load_arrays(load, tmp_path):
    def load_npz(**arrays):
        np.savez(tmp_path / "a.npz", **arrays)
        return load(tmp_path / "a.npz", inputs=PIXELS, task="image-classification", tokenizer=None)

    return load_npz


def test_arrays_are_taken_as_they_are(load_arrays):
    pixels = np.arange(24, dtype=np.float32).reshape(3, 2, 4)
    dataset = load_arrays(pixel_values=pixels, labels=np.array([2, 0, 1], np.uint8))
    batch = dataset.rows(np.array([2, 0]))
    assert np.array_equal(batch["pixel_values"], pixels[[2, 0]])
    assert batch["labels"].tolist() == [1, 2]
    assert batch["labels"].dtype == np.int64
    assert dataset.num_samples == 3


def test_all_that_is_wrong_with_arrays_is_listed(load_arrays):
    good = np.zeros((3, 2, 4), np.float32)
    with pytest.raises(
        DataError, match="labels: missing; pixel_values: missing; x: not an input of the model"
    ):
        load_arrays(x=good)
    with pytest.raises(DataError, match=r"expected float32\[batch, 2, 4\], got float64\[3, 8\]"):
        load_arrays(pixel_values=np.zeros((3, 8)), labels=np.zeros(3, int))
    with pytest.raises(DataError, match=r"labels: expected integers \[3\], got float64\[4\]"):
        load_arrays(pixel_values=good, labels=np.zeros(4))
    with pytest.raises(DataError, match="labels: 2 out of range, the first is 5; expected 0 to 2"):
        load_arrays(pixel_values=good, labels=np.array([0, 5, -100]))
    with pytest.raises(DataError, match="pixel_values: NaN or infinity"):
        load_arrays(pixel_values=good + np.nan, labels=np.zeros(3, int))
    with pytest.raises(DataError, match="pixel_values: no sample"):
        load_arrays(pixel_values=good[:0], labels=np.zeros(0, int))
    with pytest.raises(DataError, match=r"a\.npz: pixel_values: an array of Python objects; give it a dtype"):
        load_arrays(pixel_values=np.array([object()]), labels=np.zeros(1, int))
    with pytest.raises(DataError, match=r"\.npz: x0, x1, x10, .* and 92 more: not an input of the model$"):
        load_arrays(pixel_values=good, labels=np.zeros(3, int), **{f"x{i}": np.zeros(1) for i in range(100)})


TOKENS = (
    Input("input_ids", "int64", ("batch", "seq"), below=69),
    Input("attention_mask", "int64", ("batch", "seq")),
    Input("labels", "int64", ("batch",), role="labels"),
)


@pytest.fixture
def load_tokens(load, tmp_path):
    def load_npz(ids, mask=1, inputs=TOKENS, task="sequence-classification", labels=None, **changes):
        labels = np.zeros(len(ids), int) if labels is None else labels
        np.savez(
            tmp_path / "t.npz",
            input_ids=ids,
            attention_mask=np.full(ids.shape, mask, np.int64),
            labels=labels,
        )
        return load(tmp_path / "t.npz", inputs=inputs, task=task, **changes)

    return load_npz


def with_value(value, shape=(3, 4)):
    ids = np.full(shape, 68, np.int64)
    ids[2, 1] = value
    return ids


def test_ids_outside_the_models_tables_are_refused(load_tokens):
    assert load_tokens(with_value(0)).num_samples == 3
    for wrong in (-1, 69):
        with pytest.raises(
            DataError,
            match=rf"t\.npz: input_ids: 1 out of range, the first is {wrong} at \[2, 1\]; expected 0 to 68$",
        ):
            load_tokens(with_value(wrong))
    with pytest.raises(
        DataError, match=r"attention_mask: 12 out of range, the first is 2 at \[0, 0\]; expected 0 to 1"
    ):
        load_tokens(with_value(0), mask=2)


def test_where_no_limit_is_known_only_what_is_below_zero_is_refused(load_tokens):
    inputs = (Input("input_ids", "int64", ("batch", "seq")), *TOKENS[1:])
    assert load_tokens(with_value(10**6), inputs=inputs).num_samples == 3
    with pytest.raises(DataError, match=r"the first is -1 .*; expected 0 or more"):
        load_tokens(with_value(-1), inputs=inputs)


def test_rows_longer_than_the_model_are_refused(load_tokens):
    long = with_value(0, (3, 65))
    for changes in ({"bounds": {"seq": 64}}, {"tokenizer": ManifestTokenizer("tokenizer.json", 0, 64)}):
        with pytest.raises(DataError, match=r"t\.npz: 65 tokens a row, the model takes at most 64"):
            load_tokens(long, **changes)
    assert load_tokens(long, tokenizer=None).num_samples == 3
    with pytest.raises(DataError, match="input_ids: nothing in its rows"):
        load_tokens(long[:, :0])


def test_a_next_token_is_one_of_the_models(load_tokens):
    inputs = (*TOKENS[:2], Input("labels", "int64", ("batch", "seq"), role="labels"))
    labels = with_value(-100)
    assert load_tokens(with_value(0), inputs=inputs, labels=labels, task="causal-lm").num_samples == 3
    with pytest.raises(DataError, match="labels: 1 out of range, the first is 69; expected 0 to 68"):
        load_tokens(with_value(0), inputs=inputs, labels=with_value(69), task="causal-lm")


def test_labels_beyond_int64_are_not_wrapped(load_tokens):
    """2^64 - 100 would become the label of a position that is ignored."""
    inputs = (*TOKENS[:2], Input("labels", "int64", ("batch", "seq"), role="labels"))
    labels = np.full((3, 4), 2**64 - 100, np.uint64)
    with pytest.raises(DataError, match="labels: 12 out of range, the first is 18446744073709551516"):
        load_tokens(with_value(0), inputs=inputs, labels=labels, task="token-classification")


def write_bomb(path, name, shape, **arrays):
    """An NPZ file of some 100 kB whose array ``name`` is 100 MB of zeros."""
    np.savez(path, **arrays)
    with (
        zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive,
        archive.open(f"{name}.npy", "w") as file,
    ):
        np.lib.format.write_array_header_1_0(file, {"descr": "<i8", "fortran_order": False, "shape": shape})
        for _ in range(100):
            file.write(bytes(1_000_000))


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("x", (12_500_000,), "x: not an input of the model"),
        ("input_ids", (2, 6_250_000), "attention_mask: expected .*; 6250000 tokens a row, the model takes"),
        ("input_ids", (12_500_000, 1), "attention_mask: expected"),
    ],
)
def test_what_does_not_fit_is_not_unpacked(load, tmp_path, name, shape, message):
    arrays = {"input_ids": with_value(0), "attention_mask": np.ones((3, 4), int), "labels": np.zeros(3, int)}
    arrays.pop(name, None)
    write_bomb(tmp_path / "a.npz", name, shape, **arrays)
    tracemalloc.start()
    with pytest.raises(DataError, match=message):
        load(tmp_path / "a.npz", inputs=TOKENS, bounds={"seq": 64})
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()


def test_what_fits_and_is_larger_than_the_machine_is_not_unpacked(load, tmp_path, monkeypatch):
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 1024, "SC_PHYS_PAGES": 2048}.get)
    ids = np.ones((10_000, 8), np.int64)
    np.savez_compressed(tmp_path / "a.npz", input_ids=ids, attention_mask=ids, labels=ids[:, 0])
    with pytest.raises(
        DataError, match=r"a\.npz: its arrays take 1 MB, more than half of this machine's memory \(2 MB\)"
    ):
        load(tmp_path / "a.npz", inputs=TOKENS)


def npy(header):
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header


@pytest.mark.parametrize(
    ("member", "message"),
    [
        (npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (16, 1099511627776)}\n"), "memory"),
        (npy(b"{'descr': 'x', 'fortran_order': False, 'shape': (1,)}\n"), "cannot be read as NPZ"),
        (b"not an array", "labels: no array|cannot be read as NPZ"),
        (b"", "labels: no array|cannot be read as NPZ"),
    ],
)
def test_a_damaged_member_is_one_line(load_arrays, load, tmp_path, member, message):
    path = tmp_path / "bad.npz"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("labels.npy", member)
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_compression_that_is_not_known_is_one_line(load, tmp_path):
    path = tmp_path / "a.npz"
    np.savez_compressed(path, labels=np.zeros(3))
    content = bytearray(path.read_bytes())
    for start in (content.find(b"PK\x03\x04") + 8, content.find(b"PK\x01\x02") + 10):
        content[start] = 97
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz: cannot be read as NPZ: That compression method"):
        load(path)


def test_one_array_without_a_name_is_refused(load, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    (tmp_path / "a.npy").rename(tmp_path / "a.npz")
    with pytest.raises(DataError, match="one array without a name, not NPZ"):
        load(tmp_path / "a.npz")


def test_token_arrays_may_ignore_positions(load, tmp_path):
    inputs = (
        Input("input_ids", "int64", ("batch", "seq")),
        Input("labels", "int64", ("batch", "seq"), role="labels"),
    )
    np.savez(
        tmp_path / "a.npz", input_ids=np.ones((2, 3), int), labels=np.array([[0, 2, -100], [1, -100, -100]])
    )
    dataset = load(tmp_path / "a.npz", inputs=inputs, task="token-classification")
    assert dataset.rows(np.array([1]))["labels"].tolist() == [[1, -100, -100]]


def test_rows_that_are_mostly_padding_are_read_and_what_no_rows_can_be_is_not(load, tmp_path, monkeypatch):
    monkeypatch.setattr("fleetune.device_runtime.data.npz_file.UNPACKED_MIN", 1 << 20)
    ids = np.zeros((4000, 60), np.int64)
    ids[:, :5] = np.random.default_rng(0).integers(0, 69, (4000, 5))
    mask = (ids > 0).astype(np.int64)
    np.savez_compressed(tmp_path / "a.npz", input_ids=ids, attention_mask=mask, labels=ids[:, 0] % 2)
    assert load(tmp_path / "a.npz", inputs=TOKENS).num_samples == 4000
    np.savez_compressed(tmp_path / "a.npz", input_ids=0 * ids, attention_mask=0 * ids, labels=0 * ids[:, 0])
    with pytest.raises(DataError, match=r"a\.npz: its arrays take 3 MB, 512 times the file and more"):
        load(tmp_path / "a.npz", inputs=TOKENS)
