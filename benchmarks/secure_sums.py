"""What a sum under masks costs a device and the aggregator: bytes and CPU seconds, one in five dropping out after its shares.

The device's own code (``agent.masking``) and the aggregator's (``rounds.masked_round``) say the messages of the wire to each
other in one process. A device's seconds are the mean over all. Once more with certificates that vouch for all keys
(``--mask-authority``), and beside it the same updates in fp32, packed and added by FedAvg. The sum is compared with that of the
bare numbers.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
from cryptography.hazmat.primitives.serialization import Encoding

from benchmarks.measuring.figures import chart_of
from fleetune.broker.authority.certificates import Issuer, issue, self_signed
from fleetune.broker.jobs.patience import Patience
from fleetune.broker.jobs.settings import MASKS, Settings
from fleetune.broker.jobs.work import device_work
from fleetune.broker.methods.averaging import fedavg
from fleetune.broker.methods.strategy import Update
from fleetune.broker.rounds.actions import Tell
from fleetune.broker.rounds.masked_round import MaskedRound, note_of
from fleetune.broker.tasks import Task
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.masking import Masking
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.contracts.codecs import decode_update, encode_update
from fleetune.device_runtime.contracts.secure_sums.grid import added, placed, read_numbers, write_numbers
from fleetune.device_runtime.contracts.secure_sums.masking import unmask
from fleetune.device_runtime.contracts.secure_sums.vouching import Authorities, Voucher
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Offer, Request, decode, encode
from fleetune.device_runtime.errors import UnknownName, choices
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.keys import new_key

DROPPED = 0.2
CASES = {f"{count}-{size:g}": (count, size) for size in (0.3, 3.0) for count in (10, 100, 1000)}
"""Devices, and megabytes (10**6 bytes) of the adapter in float32."""
_SAMPLES = 100


def measure(say: Callable[[str], None], *, only: Sequence[str] | None = None) -> dict[str, Any]:
    """Bytes and CPU seconds of each case; ``only``: names of cases, devices-megabytes."""
    if unknown := sorted(set(only or ()) - CASES.keys()):
        raise UnknownName(f"no case {unknown[0]!r}; have: {choices(CASES)}")
    rows = []
    for name in only or CASES:
        count, megabytes = CASES[name]
        elements = round(megabytes * 1e6 / 4)
        one = Sum(count, elements)
        vouched = {f"vouched_{n}": v for n, v in Sum(count, elements, is_vouched=True).run().items()}
        found = {**one.run(), **vouched, **plain(count, elements, one.change)}
        rows.append({"case": name, **{n: round(v, 4) for n, v in found.items()}})
        say(
            f"{name}: device {found['device_s']:.3f} s, with certificates {found['vouched_device_s']:.3f} s; "
            f"aggregator {found['aggregator_s']:.2f} s, {found['vouched_aggregator_s']:.2f} s"
        )
    return {
        "benchmark": "secure-sums",
        "dropped": DROPPED,
        "rows": rows,
        "chart": chart_of("case", rows, "device_s"),
    }


class Wire:
    """A link that counts what a device says, and keeps it to be heard."""

    connections, chunk_bytes, connected = 1, 120 * 1024, True

    def __init__(self) -> None:
        self.said: list[bytes] = []

    def publish(self, topic: str, payload: bytes, *, retain: bool = False) -> None:
        """Keep a message."""
        self.said.append(payload)


class Device(NamedTuple):
    """One device."""

    name: str
    wire: Wire
    masking: Masking


class Costs:
    """CPU seconds and bytes by what they are for."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    @contextmanager
    def timed(self, what: str) -> Iterator[None]:
        """Count the CPU time of a block."""
        start = time.process_time()
        yield
        self.seconds[what] += time.process_time() - start


class Sum:
    """One round of one job."""

    def __init__(self, count: int, elements: int, *, is_vouched: bool = False) -> None:
        self.settings = Settings(
            job="bench", rounds=1, clients=count, min_clients=3, artifact="a" * 64, secure=MASKS
        )
        self.costs, self.count = Costs(), count
        self.reference = {"w": np.zeros(elements, np.float32)}
        self.machine = MaskedRound(self.settings, Patience(), number=1, first=0, now=0.0)
        first = FirstAdapter.of({"w": np.zeros(1, np.float32)})
        self.devices: dict[str, Device] = {}
        voucher, authorities = vouching() if is_vouched else (lambda name: None, None)
        for i in range(count):
            name, wire = f"device-{i:04d}", Wire()
            home = Home(
                wire, MemoryOutbox(), MemoryFiles(), Identity(name, "bench", "a" * 64, "train"), first,
                voucher=voucher(name), mask_authorities=authorities,
            )  # type: ignore[arg-type]  # fmt: skip
            self.devices[name] = Device(name, wire, Masking(home))

    def change(self, i: int) -> dict[str, np.ndarray]:
        """What device ``i`` learned."""
        rng = np.random.default_rng(i)
        return {"w": rng.normal(0, 0.01, self.reference["w"].size).astype(np.float32)}

    def hear(self, device: Device) -> None:
        """Take what a device has said."""
        for payload in device.wire.said:
            self.costs.bytes["up"] += len(payload)
            with self.costs.timed("aggregator"):
                message: Any = decode(payload)
                assert not self.machine.refusal(message)
                if self.machine.is_new(message):
                    self.machine.take(note_of(message), 0.0)
        device.wire.said.clear()

    def tell(self, actions: list[Any], here: set[str]) -> None:
        """Carry out what the machine wants told, and hear the answers."""
        for action in [a for a in actions if isinstance(a, Tell) and a.device_id in here]:
            with self.costs.timed("aggregator"):
                payload = encode(action.message)
            self.costs.bytes["down"] += len(payload)
            device = self.devices[action.device_id]
            with self.costs.timed("device"):
                device.masking.take(decode(payload))  # type: ignore[arg-type]
                device.masking.announce(0.0)
            self.hear(device)

    def advance(self, here: set[str]) -> list[Any]:
        """Let the aggregator go on."""
        with self.costs.timed("aggregator"):
            return self.machine.advance(sorted(here), 0.0)

    def begin(self) -> set[str]:
        """Keys and shares of all; their names."""
        here, template = set(self.devices), Outgoing(b"").manifest
        for i, device in enumerate(self.devices.values()):
            task = Task(
                f"t-{i}",
                device.name,
                "train",
                1,
                0,
                i,
                device_work(self.settings, round_number=1, position=i),
            )
            self.machine.ask([task])
            offer = Offer(
                job="bench", task_id=f"t-{i}", round=1, version=0, role="train", work=task.work, adapter=template,
                grid=self.settings.grid, deadline_s=0.0, mask_group=self.machine.group,
            )  # fmt: skip
            with self.costs.timed("device"):
                device.masking.begin(offer, f"key-{i}")
                device.masking.announce(0.0)
            self.hear(device)
        self.tell(self.advance(here), here)
        self.tell(self.advance(here), here)
        return here

    def run(self) -> dict[str, float]:
        """One round; what it costs."""
        here, grid = self.begin(), self.settings.grid
        names = sorted(here)
        stay = names[: round(self.count * (1 - DROPPED))]
        elements = self.reference["w"].size + 1
        total, bare = np.zeros(elements, np.uint64), np.zeros(elements, np.uint64)
        for i, name in enumerate(names[: len(stay)]):
            change = self.change(i)
            with self.costs.timed("grid"):
                numbers = placed(change, self.reference, grid, weight=_SAMPLES, seed=i).numbers
            added(bare, numbers, grid)
            with self.costs.timed("device"):
                self.devices[name].masking.mask(numbers, grid)
            with self.costs.timed("grid"):
                payload = write_numbers(numbers, grid)
            self.costs.bytes["update"] += uploaded(payload)
            with self.costs.timed("aggregator"):
                added(total, read_numbers(payload, self.reference, grid), grid)
        with self.costs.timed("aggregator"):
            assert self.machine.can_unmask(stay)
            actions = self.machine.close(stay)
        self.tell(actions, set(stay))
        with self.costs.timed("unmasking"):
            found = self.machine.unmasking()
            assert found
            unmask(total, found, grid)
        assert (total == bare).all(), "masks are left in the sum"
        return self.figures(len(stay))

    def figures(self, num_stay: int) -> dict[str, float]:
        """Bytes and CPU seconds, of a device those of one that stays."""
        seconds, carried = self.costs.seconds, self.costs.bytes
        return {
            "up_masks_bytes": carried["up"] / self.count,
            "down_masks_bytes": carried["down"] / self.count,
            "update_bytes": carried["update"] / num_stay,
            "device_s": seconds["device"] / self.count + seconds["grid"] / num_stay,
            "aggregator_s": seconds["aggregator"] + seconds["unmasking"],
            "unmasking_s": seconds["unmasking"],
        }


def vouching() -> tuple[Callable[[str], Voucher], Authorities]:
    """Make an authority: what signs for a device of a name, and whom devices then trust."""
    key = new_key()
    issuer = Issuer(self_signed("bench", key, days=30), key)

    def voucher(name: str) -> Voucher:
        own = new_key()
        certificate = issue(issuer, name, own.public_key(), days=30)
        return Voucher(certificate.public_bytes(Encoding.DER), own)

    return voucher, Authorities([issuer.certificate])


def plain(count: int, elements: int, change: Callable[[int], dict[str, np.ndarray]]) -> dict[str, float]:
    """The same updates in fp32, added by FedAvg."""
    costs, reference = Costs(), {"w": np.zeros(elements, np.float32)}
    strategy = fedavg()
    sums = strategy.init(reference)
    for i in range(stay := round(count * (1 - DROPPED))):
        values = change(i)
        with costs.timed("device"):
            payload = encode_update("fp32", values, reference)
        costs.bytes["update"] += uploaded(payload)
        with costs.timed("aggregator"):
            sums = strategy.add(sums, Update(decode_update(payload, reference), reference, _SAMPLES))
    return {
        "fp32_update_bytes": costs.bytes["update"] / stay,
        "fp32_device_s": costs.seconds["device"] / stay,
        "fp32_aggregator_s": costs.seconds["aggregator"],
    }


def uploaded(payload: bytes) -> int:
    """Bytes of the messages that a payload goes up in."""
    outgoing = Outgoing(payload)
    chunks = len(outgoing.manifest.chunk_digests) // 8
    missing = bytes([255] * -(-chunks // 8))
    wanted = Request(sha256=outgoing.manifest.sha256, missing=missing, limit=chunks)
    return sum(len(encode(chunk)) for chunk in outgoing.chunks(wanted))
