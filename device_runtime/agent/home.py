"""What a device lives in: its connection, what it keeps, who it is, and the adapter that it starts from."""

from collections.abc import Callable
from hashlib import sha256
from typing import NamedTuple

from fleetune.device_runtime.agent.events import Event
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import Outbox
from fleetune.device_runtime.agent.state_folder import StateFolder
from fleetune.device_runtime.agent.vitals import Vitals
from fleetune.device_runtime.arrays import Arrays, to_bytes
from fleetune.device_runtime.contracts.secure_sums.vouching import Authorities, Voucher
from fleetune.device_runtime.files import Files
from fleetune.device_runtime.network.connection import Connection
from fleetune.device_runtime.network.signing import Trusted
from fleetune.device_runtime.terms.contract import Contract


class FirstAdapter(NamedTuple):
    """Version 0 of an artifact's adapter, ready to be compared; agents of one artifact share one."""

    arrays: Arrays
    """Float32 by tensor name, read-only."""
    content: bytes
    """The same as a safetensors file."""
    digest: str
    """SHA-256 of ``content``, in hexadecimal."""

    @classmethod
    def of(cls, arrays: Arrays) -> "FirstAdapter":
        """Pack and hash an adapter, once for all agents of a process."""
        content = to_bytes(arrays)
        views = {name: array.view() for name, array in arrays.items()}
        for view in views.values():
            view.setflags(write=False)
        return cls(views, content, sha256(content).hexdigest())


def _ignore(event: Event) -> None:
    """Tell nobody."""


class Home(NamedTuple):
    """What every part of one agent works with."""

    link: Connection
    """Open, subscribed to ``identity.topics``, with ``identity.will``."""
    outbox: Outbox
    files: Files
    identity: Identity
    adapter: FirstAdapter
    checkpoint_every: int = 20
    """Steps between two checkpoints; 0 for none but at a pause."""
    on_event: Callable[[Event], object] = _ignore
    """Told of everything that happens."""
    hello_s: float = 0.0
    """A device that has nothing to do and has heard nothing for so long says hello again; 0 for the usual time."""
    contract: Contract | None = None
    """What its owner allows; None for a simulated device, which has no owner."""
    trusted: Trusted | None = None
    """The keys of which one must have signed what an aggregator says; None to take it from anybody."""
    voucher: Voucher | None = None
    """Signs its keys of sums under masks; None without a certificate."""
    mask_authorities: Authorities | None = None
    """Of which one must have signed the certificates that vouch for others' keys; None to mask with any."""
    vitals: Callable[[], Vitals] | None = None
    """Reads how the machine does, for who looks at the job; None to tell nothing of progress."""

    @property
    def state(self) -> StateFolder:
        """Adapter and checkpoints among ``files``."""
        return StateFolder(self.files)
