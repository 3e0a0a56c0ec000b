"""Fixtures of every test: real MQTT servers."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from servers import Mosquitto

if TYPE_CHECKING:
    from broker.embedded import EmbeddedServer


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
    from broker.embedded import EmbeddedServer  # most tests need no amqtt

    with EmbeddedServer() as server:
        yield server


@pytest.fixture(params=["mosquitto", "embedded"])
def mqtt_url(request: pytest.FixtureRequest) -> str:
    """Address of one real server of each make."""
    return request.getfixturevalue(request.param).url
