"""From a configuration to its devices: columns that lie beside the data."""

import numpy as np
import pytest
from simulated import TINY, devices, run, write_config
from tiny import draw_batch

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.errors import DataError
from fleetune.toolkit.simulation.bench import Datasets
from fleetune.toolkit.simulation.config import load_config
from fleetune.toolkit.simulation.fleet import fleet_of

SPEAKERS = [f"s{i % 3}" for i in range(30)]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Arrays alone, and who spoke in a file of its own."""
    path = write_config(tmp_path_factory.mktemp("fleet"))
    np.savez(path.parent / "train.npz", **draw_batch(open_artifact(TINY).manifest, 30, 16))
    write_column(path.parent / "who.csv", SPEAKERS)
    (path.parent / "by.toml").write_text(
        'include = "simulation.toml"\n[data]\ntrain = "train.npz"\n[partition]\nkind = "by"\ncolumn = "speaker"\n'
        'file = "who.csv"\ndevices = 0\nmin_samples = 1\n'
    )
    return path.parent / "by.toml"


def write_column(path, values):
    path.write_text("\n".join(["speaker,mood", *(f"{value},glad" for value in values)]) + "\n")


def fleet(base, *overrides):
    config = load_config(base, overrides)
    return fleet_of(config, Datasets(TINY).whole(config.data.train, config.work.seq_len))


def test_a_column_beside_the_arrays_says_whose_an_example_is(base):
    found = fleet(base)
    held = [{SPEAKERS[i] for i in spec.share.indices} for spec in found]
    assert held == [{"s0"}, {"s1"}, {"s2"}]
    assert [spec.samples for spec in found] == [10, 10, 10]
    limited = fleet(base, "data.limit_train=12")
    assert sum(spec.samples for spec in limited) == 12
    assert all(len({SPEAKERS[i] for i in spec.share.indices}) == 1 for spec in limited)


def test_a_fleet_of_arrays_and_a_column_is_simulated(base):
    run(base, "by", "rounds=1")
    assert [device["samples"] for device in devices(base.parent / "by")] == [10, 10, 10]


def test_a_column_of_another_length_is_refused(base):
    write_column(base.parent / "short.csv", SPEAKERS[:-1])
    short = f"partition.file={base.parent / 'short.csv'}"
    for more in ([], ["data.limit_train=12"]):
        with pytest.raises(
            DataError, match=r"short\.csv: column 'speaker' has 29 values, for 30 training examples"
        ):
            fleet(base, short, *more)
    with pytest.raises(DataError, match=r"no .*age"):
        fleet(base, "partition.column=age")


def test_data_of_other_columns_is_the_same_data(base):
    words = [f"turn the lamp {'on' if i % 2 else 'off'}" for i in range(40)]
    for name, header in (("plain.csv", "text,label"), ("named.csv", "q,intent")):
        lines = (f"{text},{'ab'[i % 2]}" for i, text in enumerate(words))
        (base.parent / name).write_text("\n".join([header, *lines]) + "\n")
    data, digests = Datasets(TINY), []
    for name, more in (("plain.csv", ()), ("named.csv", ("data.text_column=q", "data.label_column=intent"))):
        paths = [f"data.{part}={base.parent / name}" for part in ("train", "test")]
        config = load_config(base.parent / "simulation.toml", [*paths, *more])
        digests.append(data.whole(config.data.train, 16, config.data.columns).digest)
        shares = [
            spec.share for spec in fleet_of(config, data.whole(config.data.train, 16, config.data.columns))
        ]
        assert all(data.of(share, 16).num_samples for share in shares)
    assert digests[0] == digests[1]
