"""Fixtures of every test: a small artifact and its data, real MQTT servers.

FLEETUNE_FUZZ=1 draws other examples every time; else they are the same.
"""

import gc
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
from servers import Mosquitto
from words import write_lines

hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None)
if not os.environ.get("FLEETUNE_FUZZ"):
    hypothesis.settings.load_profile("repeatable")

# A shell's background job ignores SIGINT, and so would every child of it.
signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from fleetune.broker.servers.embedded import EmbeddedServer


TINY_ARTIFACT = Path(__file__).parent / "data" / "tiny_artifact"
OPEN_FILES_MAX = 400
"""More are left by fleets that were killed in process, in cycles; paho waits with ``select``, which takes no file beyond 1023."""


@pytest.fixture(autouse=True)
def close_what_killed_fleets_left_open() -> Iterator[None]:
    """Collect cycles before too many files are open."""
    yield
    if len(os.listdir("/proc/self/fd")) > OPEN_FILES_MAX:
        gc.collect()


@pytest.fixture(scope="session")
def word_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real artifact: four layers, five classes ``a`` to ``e``, a tokenizer that knows twelve words; made without torch."""
    return Path(shutil.copytree(TINY_ARTIFACT, tmp_path_factory.mktemp("words") / "artifact"))


@pytest.fixture(scope="session")
def word_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 lines of words that it knows, labelled ``a``, ``b`` or ``c``."""
    return write_lines(tmp_path_factory.mktemp("lines") / "words.csv")


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A Mosquitto that takes anyone."""
    with Mosquitto(tmp_path) as server:
        yield server


@pytest.fixture
def start_mosquitto(tmp_path: Path) -> Iterator[Callable[..., Mosquitto]]:
    """Starts a Mosquitto with the configuration lines given, or with ``configuration=`` a file."""
    with ExitStack() as stack:
        yield lambda *lines, **options: stack.enter_context(Mosquitto(tmp_path, *lines, **options))


@pytest.fixture
def embedded() -> "Iterator[EmbeddedServer]":
    from fleetune.broker.servers.embedded import EmbeddedServer  # most tests need no amqtt

    with EmbeddedServer() as server:
        yield server


@pytest.fixture(params=["mosquitto", "embedded"])
def mqtt_url(request: pytest.FixtureRequest) -> str:
    """Address of one real server of each make."""
    return request.getfixturevalue(request.param).url
