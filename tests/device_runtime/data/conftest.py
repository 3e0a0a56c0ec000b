import pytest

from fleetune.device_runtime.data.loading import load_dataset


@pytest.fixture
def load(text_folder, make_manifest):
    def load_path(path, **changes):
        options = {k: changes.pop(k) for k in ("seq_len", "labelled", "columns", "sequences") if k in changes}
        return load_dataset(path, make_manifest(**changes), text_folder, **{"seq_len": 128, **options})

    return load_path
