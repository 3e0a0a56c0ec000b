"""What a signature costs: bytes and CPU microseconds of a message, and of what a device that trusts a key refuses."""

import logging
import statistics
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from benchmarks.measuring.figures import table
from fleetune.device_runtime.agent.guard import Guard, OpenDoor
from fleetune.device_runtime.agent.home import FirstAdapter, Home
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.outbox import MemoryOutbox
from fleetune.device_runtime.contracts.transfer import Outgoing
from fleetune.device_runtime.contracts.wire import Message, Offer, Verdict, device_topic, encode
from fleetune.device_runtime.contracts.work import LocalWork
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network.loopback import Loopback
from fleetune.device_runtime.network.signing import Signer, Trusted

REPEATS, CALLS = 7, 500
ADAPTER_BYTES = 320_000
"""MiniLM's, LoRA r=8 on query and value."""
DOWN = device_topic("job", "device", "down")
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = REPEATS) -> dict[str, Any]:
    """One row per message: bytes, and CPU microseconds to make and to take it, unsigned and signed; and to refuse bad ones."""
    logging.disable(logging.WARNING)
    adapter = Outgoing(bytes(ADAPTER_BYTES)).manifest
    names = {"job": "job", "round": 7, "task_id": "train-7-device"}
    offer = Offer(
        **names,
        version=6,
        role="train",
        work=LocalWork(),
        adapter=adapter,
        adapter_sha256="a" * 64,
        deadline_s=600.0,
    )
    verdict = Verdict(**names, digest="a" * 64, accepted=True)
    rows = [_costs(name, message, repeats) for name, message in {"offer": offer, "verdict": verdict}.items()]
    for line in table(rows):
        say(line)
    return {"benchmark": "signatures", "repeats": repeats, "rows": rows}


def _costs(name: str, message: Message, repeats: int) -> dict[str, Any]:
    key, stranger = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    signer, guard, door = Signer(key, start=2), _guard(key), OpenDoor()
    plain = encode(message)
    signed = signer.seal(DOWN, plain)
    guard.open(DOWN, signed, 0.0)
    bad = {
        "unsigned": plain,
        "strange": Signer(stranger, start=2).seal(DOWN, plain),
        "old": Signer(key, start=1).seal(DOWN, plain),
        "forged": signed[:-64] + bytes(64),
    }
    refused = {
        f"refuse_{kind}_us": _us(lambda frame=frame: guard.open(DOWN, frame, 0.0), repeats)
        for kind, frame in bad.items()
    }
    return {
        "": name,
        "bytes": len(plain),
        "signed_bytes": len(signed),
        "encode_us": _us(lambda: encode(message), repeats),
        "sign_us": _us(lambda: signer.seal(DOWN, plain), repeats),
        "decode_us": _us(lambda: door.open(DOWN, plain, 0.0), repeats),
        "verify_and_decode_us": _us(lambda: guard.open(DOWN, signed, 0.0), repeats),
        **refused,
    }


def _guard(key: Ed25519PrivateKey) -> Guard:
    adapter = FirstAdapter({}, b"", "")
    link = Loopback().connect([])
    home = Home(link, MemoryOutbox(), MemoryFiles(), Identity("device", "job", "a" * 64), adapter)
    return Guard(home, Trusted([key.public_key()]))


def _us(work: Callable[[], object], repeats: int) -> float:
    """Median over repeats of the mean of CALLS calls."""
    found = []
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(CALLS):
            work()
        found.append((time.process_time() - start) / CALLS * 1e6)
    return round(statistics.median(found), 1)
