"""A fleet with identities: an authority, enrolled devices, and a real Mosquitto configured for them."""

import getpass
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from certificates import Pair
from servers import Mosquitto, free_port

from fleetune.broker.authority.authority import init, sign
from fleetune.broker.servers.mosquitto import write_configuration
from fleetune.device_runtime.commands.enrol import enrol
from fleetune.device_runtime.network.address import Reach


def authority_of(folder: Path, names: Iterable[str]) -> tuple[Path, dict[str, Pair]]:
    """Make an authority in a new folder, with a server's certificate for this machine: its own, and those that it signs."""
    init(folder, hosts=["127.0.0.1"])
    pairs = {}
    for name in names:
        made = enrol(name, out=folder.parent / f"own-{name}")
        sign(folder, request=made.request, out=folder.parent / f"own-{name}")
        pairs[name] = Pair(made.certificate, made.key)
    return folder / "ca.crt", pairs


class Fleet:
    """Everything lies below ``folder``; ``start`` is conftest's ``start_mosquitto``."""

    def __init__(self, folder: Path, start: Callable[..., Mosquitto], **options) -> None:
        self.folder, self.authority = folder, folder / "authority"
        self.port, self.aggregator_port = free_port(), free_port()
        self._options = options
        init(self.authority, hosts=["127.0.0.1"])
        self.server = start(configuration=self.configure(), port=self.port)
        self.url, self.aggregator_url = (f"mqtts://127.0.0.1:{p}" for p in (self.port, self.aggregator_port))

    def configure(self) -> Path:
        """Write the server's configuration anew, with what the authority says now."""
        return write_configuration(
            self.folder / "server", port=self.port, aggregator_port=self.aggregator_port, host="127.0.0.1",
            authority=self.authority, user=getpass.getuser(), **self._options,
        )  # fmt: skip

    def device(self, name: str) -> Reach:
        """Enrol a device and bring it what the authority makes of its request."""
        own = self.folder / name
        made = enrol(name, out=own)
        shutil.copytree(sign(self.authority, request=made.request).folder, own, dirs_exist_ok=True)
        return Reach(ca_file=str(own / "ca.crt"), cert=made.certificate, key=made.key)

    @property
    def aggregator(self) -> Reach:
        own = self.authority
        return Reach(
            ca_file=str(own / "ca.crt"), cert=str(own / "aggregator.crt"), key=str(own / "aggregator.key")
        )
