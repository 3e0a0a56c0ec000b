"""Every reader of the product with whole samples of what it reads and a way to damage them, for :mod:`fuzz`."""

import gzip
import io
import json
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import reduce
from importlib.util import find_spec
from pathlib import Path
from unittest.mock import patch

import fleet
import msgspec
import mutations
import numpy as np
from enrolled import authority_of
from fleetune_metrics import samples_of
from fuzz import Reader
from paths import ROOT
from simulated import FILE, write_config
from tiny import as_problem
from words import write_lines

from fleetune.broker.jobs.patience import Patience
from fleetune.broker.store import settling
from fleetune.broker.store.kept_versions import read_version
from fleetune.broker.store.ledger import Ledger
from fleetune.broker.store.rows import rows
from fleetune.device_runtime.agent.codec_memory import CodecMemory
from fleetune.device_runtime.agent.identity import Identity
from fleetune.device_runtime.agent.made import Made
from fleetune.device_runtime.agent.outbox_file import OutboxFile
from fleetune.device_runtime.agent.state_folder import parse_adapter
from fleetune.device_runtime.arrays import load_arrays, to_bytes
from fleetune.device_runtime.commands.generate import read_ends, read_prompt
from fleetune.device_runtime.contracts.adapters import load_peft, save_peft
from fleetune.device_runtime.contracts.artifact import (
    ADAPTER,
    CHAT_TEMPLATE,
    GENERATION,
    MANIFEST,
    open_artifact,
)
from fleetune.device_runtime.contracts.evaluation_file import Evaluated, added
from fleetune.device_runtime.contracts.graph_file import graph_problems
from fleetune.device_runtime.contracts.manifest import Tokenizer
from fleetune.device_runtime.contracts.mask_messages import MaskPeer
from fleetune.device_runtime.contracts.run_file import (
    EVALUATION,
    EVALUATIONS,
    LEDGER,
    ROUNDS,
    RUN,
    read_labels,
    read_seq_len,
)
from fleetune.device_runtime.contracts.secure_sums.keys import Scope
from fleetune.device_runtime.contracts.secure_sums.vouching import open_voucher, problem_of_peer
from fleetune.device_runtime.contracts.wire import aggregator_topic, decode, device_topic
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec
from fleetune.device_runtime.data import chat, language, template_process
from fleetune.device_runtime.data.loading import load_dataset
from fleetune.device_runtime.engine.backends import open_engine
from fleetune.device_runtime.engine.hidden_cache import HiddenCache
from fleetune.device_runtime.errors import ArtifactError, StateError, WireError, some
from fleetune.device_runtime.files import MemoryFiles
from fleetune.device_runtime.network import packets
from fleetune.device_runtime.network.signing import read_authorities
from fleetune.device_runtime.rules.rules_file import load_rules
from fleetune.device_runtime.terms.day import Day
from fleetune.device_runtime.terms.left import NEWEST, Left, Record
from fleetune.device_runtime.training.trainer import Trainer
from fleetune.toolkit.watching.fleet import Fleet
from fleetune.toolkit.watching.metrics import exposition

TINY, CHATTY = (ROOT / "tests" / "data" / name for name in ("tiny_artifact", "chat_artifact"))
WIRE = ROOT / "tests" / "data" / "wire"
_SERVED = 1000
"""Messages that one service or agent is sent before another takes its place."""


def _frames() -> list[bytes]:
    dialogue = [bytes.fromhex(one["bytes"]) for one in json.loads((WIRE / "dialogue.json").read_text())]
    return list(dict.fromkeys(dialogue))


@contextmanager
def wire(folder: Path) -> Iterator[Reader]:
    """``decode``."""
    yield Reader(_frames(), mutations.of_msgpack, decode)


@contextmanager
def packet(folder: Path) -> Iterator[Reader]:
    """MQTT packets, as far as they are read here; what is left to the client library is told as refused."""

    def read(content: bytes) -> None:
        inbox = packets.Inbox(max(1, len(content)))
        inbox.fill(io.BytesIO(content).readinto)
        try:
            found = inbox.packet()
        except ValueError as exc:
            raise WireError(str(exc)) from exc
        if not found or packets.letter_of(found, is_v5=True) is None:
            raise WireError("left to the client library")

    samples = [packets.publication(b"j/a/up", frame, 1, flags=2, is_v5=True) for frame in _frames()]
    yield Reader(samples, mutations.of_bytes, read)


class _Ends:
    """A job in memory, with all that its ends said, for one of them to be sent damaged."""

    def __init__(self) -> None:
        self.said: list[tuple[str, bytes]] = []
        calm = self.world(rounds=3)
        calm.run()

    def world(self, **changes: object) -> fleet.World:
        server = fleet.Loopback(disturb=self._heard)
        changes = {"clients": 2, "min_clients": 1, "codec": "int8", "size": 60, "in_memory": True, **changes}
        aggregator = fleet.Aggregator(
            server, Path("nowhere"), patience=Patience(extensions_max=10**9), **changes
        )
        aggregator.folder = Path("/dev/shm")
        aggregator.start()
        devices = [fleet.Device(server, None, n, size=60).start() for n in (0, 1)]
        return fleet.World(
            server,
            aggregator,
            [*devices, fleet.Device(server, None, 9, name="eval", role="evaluate", size=60).start()],
        )

    def _heard(self, topic: str, payload: bytes) -> tuple[bytes, ...]:
        self.said.append((topic, payload))
        return (payload,)


def _end(ends: _Ends, take: Callable[[fleet.World, str, bytes], None], *, is_up: bool) -> Reader:
    said = list(
        dict.fromkeys(
            (t, p) for t, p in ends.said if t.endswith(("/up", "device-0/status", "eval/status")) == is_up
        )
    )
    topics = sorted({topic for topic, _ in said})
    left, world = 0, None

    def read(content: bytes) -> None:
        nonlocal left, world
        if not left:
            world, left = ends.world(rounds=100_000), _SERVED
            for _ in range(12):
                world.turn()
        left -= 1
        take(world, topics[content[0] % len(topics)], content[1:])
        if left % 10 == 0:
            world.turn()

    samples = [bytes([topics.index(topic)]) + payload for topic, payload in said]
    return Reader(samples, lambda content, rng: content[:1] + mutations.of_msgpack(content[1:], rng), read)


@contextmanager
def service(folder: Path) -> Iterator[Reader]:
    """A live aggregator, sent by a device what devices say."""

    def take(world: fleet.World, topic: str, content: bytes) -> None:
        if not world.aggregator.service.finished:
            world.aggregator.service.take(topic, content, world.now)

    yield _end(_Ends(), take, is_up=True)


@contextmanager
def watcher(folder: Path) -> Iterator[Reader]:
    """Who watches, sent what a job says; with all that is made of it."""
    golden = json.loads((WIRE / "messages.json").read_text())
    topics = {
        "device_status": device_topic("job", "device-id", "status"),
        "aggregator_status": aggregator_topic("job"),
        "view": aggregator_topic("job", "view"),
    }
    watched = Fleet("job")

    def read(content: bytes) -> None:
        topic = [*topics.values()][content[0] % len(topics)]
        watched.take(topic, content[1:], 0.0)
        state = watched.state(1.0)
        samples_of(exposition(state))
        msgspec.json.encode(state)
        decode(content[1:])  # what is no message is left out, and told as refused here

    samples = [bytes([i]) + bytes.fromhex(golden[kind]["bytes"]) for i, kind in enumerate(topics)]
    yield Reader(samples, lambda content, rng: content[:1] + mutations.of_msgpack(content[1:], rng), read)


@contextmanager
def agent(folder: Path) -> Iterator[Reader]:
    """A live device, sent what an aggregator says."""

    def take(world: fleet.World, topic: str, content: bytes) -> None:
        for device in world.devices:
            device.agent.take(topic, content, world.now)

    yield _end(_Ends(), take, is_up=False)


@contextmanager
def ledger(folder: Path) -> Iterator[Reader]:
    """A job's ledger, opened by its aggregator and by ``merge``; one with settled rounds too."""
    world = fleet.world(folder, numbers=(0, 1), evaluate=True, rounds=3, codec="int8").run()
    settings, out = world.aggregator.settings, folder / "aggregator"
    world.aggregator.kill()
    path = out / LEDGER
    samples = [_settled(path)]
    with patch.object(settling, "AT_ONCE", 1), Ledger(out, settings) as opened:
        opened.settle(3, most=2)
    samples.append(_settled(path))

    def read(content: bytes) -> None:
        _replace(path, content)
        with Ledger(out, settings) as opened:
            opened.past()
            list(opened.outcomes()), list(opened.decided()), list(opened.accepted()), rows(opened)
            (
                opened.version(opened.newest),
                opened.strategy_state(opened.newest),
                opened.cost(),
                opened.carried(),
            )
            opened.last_update("device-0"), opened.version_with("0" * 64), opened.turns()
        read_version(out)

    yield Reader(samples, mutations.of_sqlite(folder / "scratch.sqlite"), read)


def _settled(path: Path) -> bytes:
    """A database without its log."""
    sql = sqlite3.connect(path)
    sql.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    sql.execute("PRAGMA journal_mode = DELETE")
    sql.close()
    return path.read_bytes()


def _replace(path: Path, content: bytes) -> None:
    for old in (path, path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-shm")):
        old.unlink(missing_ok=True)  # another inode: a database that somebody forgot to close holds its locks
    path.write_bytes(content)


@contextmanager
def outbox(folder: Path) -> Iterator[Reader]:
    """A device's outbox, opened by a device of its job."""
    server = fleet.Loopback()
    aggregator = fleet.Aggregator(
        server, folder, clients=1, min_clients=1, rounds=3, size=20, in_memory=True
    ).start()
    from fleetune.device_runtime.terms.terms import Terms

    device = fleet.Device(
        server, folder, 0, size=20, terms=Terms(least_samples=0, least_effective=0, least_batch=0)
    ).start()
    world = fleet.World(server, aggregator, [device])
    world.run(until=lambda: "trained" in device.kinds() or device.outbox.pending())
    device.kill()
    path = device.folder / "outbox.sqlite"
    samples = [_settled(path), (ROOT / "tests" / "data" / "device_0_1" / "outbox.sqlite").read_bytes()]

    def read(content: bytes) -> None:
        _replace(path, content)
        with OutboxFile(path) as opened:
            opened.recall("device_id")
            Day(opened, wall_s=2e9).add(5.0, wall_s=2e9, key="k", sent_bytes=7)
        again = fleet.Device(
            fleet.Loopback(),
            folder,
            0,
            size=20,
            terms=Terms(least_samples=0, least_effective=0, least_batch=0),
        )
        try:
            again.start()
            again.agent.poll(0.0)
            Made(again.outbox, Identity("device-0", fleet.JOB, fleet.ARTIFACT, "train")).key(
                "train-1-device-0"
            )
        finally:
            if again.outbox:
                again.outbox.close()

    yield Reader(samples, mutations.of_sqlite(folder / "scratch.sqlite"), read)


@contextmanager
def checkpoint(folder: Path) -> Iterator[Reader]:
    """A checkpoint of local training; those of releases without a checksum too."""
    artifact = open_artifact(TINY)
    data = load_dataset(write_lines(folder / "w.csv"), artifact.manifest, artifact.folder, seq_len=8)
    work = LocalWork(steps=4, batch_size=4, optimizer=OptimizerSpec(proximal=0.1))
    path = folder / "checkpoint.safetensors"
    with open_engine(artifact, threads=1) as engine:
        trainer = Trainer(engine, data, work, artifact.adapter())
        trainer.step(), trainer.step()
        trainer.save(path)
        sample = path.read_bytes()

        def read(content: bytes) -> None:
            path.write_bytes(content)
            again = Trainer(engine, data, work, artifact.adapter())
            try:
                again.restore(path)
            except StateError:
                assert again.step_index == 0
                raise
            with np.errstate(all="ignore"):
                again.step() if not again.done else None

        yield Reader([sample, _unsealed(sample)], mutations.of_header, read)


def _unsealed(content: bytes) -> bytes:
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    said = json.loads(header["__metadata__"]["fleetune.checkpoint"])
    del said["sha256"]
    header["__metadata__"]["fleetune.checkpoint"] = json.dumps(said)
    new = json.dumps(header).encode()
    return len(new).to_bytes(8, "little") + new + content[8 + size :]


@contextmanager
def codec_memory(folder: Path) -> Iterator[Reader]:
    """What a device's codec owes: never refused but set aside."""
    files = MemoryFiles()
    memory = CodecMemory(files, job="job", artifact="a" * 64)
    memory.keep(3, {"residual/w": np.ones(5)})
    (name,) = files.names()
    sample = files.read(name) or b""

    def read(content: bytes) -> None:
        files.write(name, content)
        found = memory.before(4)
        if not found:
            assert memory.before(4) == {}
            assert content == b"" or f"{name}.aside" in files.names() or files.read(name) == content

    yield Reader([sample], mutations.of_header, read)


@contextmanager
def old_residual(folder: Path) -> Iterator[Reader]:
    """What a codec of release 0.1.0 owed."""
    sample = (ROOT / "tests" / "data" / "device_0_1" / "residual-000001.safetensors").read_bytes()
    like = load_arrays(TINY / ADAPTER)

    def read(content: bytes) -> None:
        files = MemoryFiles()
        files.write("residual-000001.safetensors", content)
        memory = CodecMemory(files, job="job", artifact="a" * 64)
        memory.adopt(lambda _: True, like=like)
        memory.before(2)

    yield Reader([sample], mutations.of_header, read)


@contextmanager
def hidden_cache(folder: Path) -> Iterator[Reader]:
    """The hidden cache's file, damaged while it is in use."""
    with HiddenCache(folder, lengths=None, limit_bytes=1 << 20) as cache:
        examples = np.arange(6)
        found = cache.of(examples, {})
        found.store(np.ones(6, bool), np.ones((6, 4, 3), np.float32))
        path = folder / "hidden.f16"

        def read(content: bytes) -> None:
            path.write_bytes(content)
            hidden, missing = found.load((6, 4, 3))
            assert hidden.shape == (6, 4, 3)
            assert missing.shape == (6,)

        yield Reader([path.read_bytes()], mutations.of_bytes, read)


@contextmanager
def manifest(folder: Path) -> Iterator[Reader]:
    """An artifact's manifest."""
    twin = Path(shutil.copytree(TINY, folder / "artifact"))

    def read(content: bytes) -> None:
        (twin / MANIFEST).write_bytes(content)
        found = open_artifact(twin, verify=False)
        for tensor in found.manifest.tensors:
            if tensor.file == "base":
                found.base(tensor)
        found.adapter()

    yield Reader([(TINY / MANIFEST).read_bytes()], mutations.of_json, read)


@contextmanager
def graph(folder: Path) -> Iterator[Reader]:
    """The graphs of an artifact, before onnxruntime sees them."""
    path = folder / "x.onnx"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        if found := [*graph_problems(path)]:
            raise ArtifactError(some(found))

    samples = [file.read_bytes() for file in sorted((TINY / "graphs").iterdir())]
    yield Reader(samples, mutations.of_bytes, read)


@contextmanager
def adapter(folder: Path) -> Iterator[Reader]:
    """An adapter's weights: of an artifact, of a PEFT folder, and as a transfer."""
    opened = open_artifact(TINY)
    peft = folder / "peft"
    save_peft(peft, opened.manifest, opened.adapter())
    path = peft / "adapter_model.safetensors"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        try:
            parse_adapter(content, opened.adapter())
        finally:
            load_peft(peft, opened.manifest)

    yield Reader([path.read_bytes(), to_bytes(opened.adapter())], mutations.of_header, read)


@contextmanager
def adapter_config(folder: Path) -> Iterator[Reader]:
    """A PEFT folder's configuration."""
    opened = open_artifact(TINY)
    peft = folder / "peft"
    save_peft(peft, opened.manifest, opened.adapter())

    def read(content: bytes) -> None:
        (peft / "adapter_config.json").write_bytes(content)
        load_peft(peft, opened.manifest)

    yield Reader([(peft / "adapter_config.json").read_bytes()], mutations.of_json, read)


def _file(name: str, content: bytes, mutate: mutations.Mutation, read: Callable[[Path], object]) -> Callable:
    @contextmanager
    def reader(folder: Path) -> Iterator[Reader]:
        def written(damaged: bytes) -> None:
            (folder / name).write_bytes(damaged)
            read(folder / name)

        yield Reader([content], mutate, written)

    return reader


def _data(name: str, samples: Callable[[Path], bytes], mutate: mutations.Mutation) -> Callable:
    @contextmanager
    def data(folder: Path) -> Iterator[Reader]:
        opened = open_artifact(TINY)
        path = folder / name

        def read(content: bytes) -> None:
            path.write_bytes(content)
            found = load_dataset(path, opened.manifest, opened.folder, seq_len=16)
            assert ((found.labels >= 0) & (found.labels < 5)).all()

        yield Reader([samples(folder)], mutate, read)

    return data


def _language(name: str, sample: bytes, mutate: mutations.Mutation) -> Callable:
    """A file for a language model; its chats are rendered by one process, or a fresh one where a chat has ended it."""

    @contextmanager
    def data(folder: Path) -> Iterator[Reader]:
        opened, path, renders = open_artifact(CHATTY), folder / name, []
        with ExitStack() as stack:

            @contextmanager
            def kept(*where: object) -> Iterator[chat.Chat]:
                if not renders or renders[-1]._process.poll() is not None:
                    renders.append(stack.enter_context(chat.open_chat(*where)))
                yield renders[-1]

            def read(content: bytes) -> None:
                path.write_bytes(content)
                with patch.object(language, "open_chat", kept):
                    found = load_dataset(path, opened.manifest, opened.folder, seq_len=64)
                assert found.lengths.max() <= 64

            yield Reader([sample], mutate, read)

    return data


@contextmanager
def chat_template(folder: Path) -> Iterator[Reader]:
    """A chat template, compiled and applied as its process does it, and the answers of that process."""
    path, template = folder / "chat_template.jinja", (CHATTY / CHAT_TEMPLATE).read_bytes()
    tokenizer = Tokenizer("t", 0, 8, chat_template=path.name, special_tokens={"eos_token": "<|im_end|>"})
    described = msgspec.structs.replace(open_artifact(CHATTY).manifest, tokenizer=tokenizer)
    asked = json.dumps({"messages": _CHAT, "add_generation_prompt": True})

    class Pipes:
        """The process, here."""

        def __init__(self, *_: object) -> None:
            self.stdin, self.stdout = io.BytesIO(), self

        def readline(self, _: int) -> bytes:
            answers = io.StringIO()
            template_process.serve(self.stdin.getvalue().decode().splitlines(), answers)
            return answers.getvalue().splitlines(keepends=True)[-1].encode()

        def kill(self) -> None:
            """Nothing to end."""

        close = wait = kill

    def read(content: bytes) -> None:
        is_answer = content.startswith(b'{"')
        path.write_bytes(template if is_answer else content)
        with (
            patch.object(chat, "_started", Pipes),
            patch.object(template_process, "_lock", lambda: None),
            patch.object(template_process, "_allow_time", lambda _: None),
            patch.object(Pipes, "readline", lambda *_: content + b"\n") if is_answer else nullcontext(),
            chat.open_chat(described, folder) as opened,
        ):
            text = opened.render(json.loads(asked)["messages"], add_generation_prompt=True)
        assert isinstance(text, str)

    yield Reader([template, b'{"text": "a", "spans": [[0, 1]], "error": ""}'], mutations.of_bytes, read)


_CHAT = [{"role": "user", "content": "lamp on"}, {"role": "assistant", "content": "it is on"}]
_CHATS = (
    json.dumps({"messages": _CHAT}).encode() + b'\n{"prompt": "a", "completion": "b"}\n{"text": "lamp"}\n'
    b'{"conversations": [{"from": "human", "value": "lamp on"}, {"from": "gpt", "value": "it is on"}], "tools": []}\n'
)


@contextmanager
def label_sets(folder: Path) -> Iterator[Reader]:
    """Lines with several labels each, as names, as text and as a row of bits."""
    opened = open_artifact(TINY)
    manifest, path = (
        as_problem(opened.manifest, "multi_label_classification", ("a", "b", "c")),
        folder / "a.jsonl",
    )

    def read(content: bytes) -> None:
        path.write_bytes(content)
        found = load_dataset(path, manifest, opened.folder, seq_len=16).columns["labels"].values
        assert ((found == 0) | (found == 1)).all()

    labels = (b'["a", "c"]', b'"a;b"', b"[0.0, 1.0, 1.0]", b'"[\\"b\\"]"')
    lines = (b'{"text": "red cat", "labels": %s}\n' % one for one in labels)
    yield Reader([b"".join(lines)], mutations.of_lines, read)


@contextmanager
def numbers(folder: Path) -> Iterator[Reader]:
    """Lines with a number each."""
    opened = open_artifact(TINY)
    manifest, path = as_problem(opened.manifest, "regression", ("value",)), folder / "a.csv"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        assert np.isfinite(
            load_dataset(path, manifest, opened.folder, seq_len=16).columns["labels"].values
        ).all()

    yield Reader([b'text,label\nred cat,1.5\n"red, green",-2e3\nhen,0\n'], mutations.of_lines, read)


def _jsonl(folder: Path) -> bytes:
    return b"".join(b'{"text": "red cat", "label": "%s"}\n' % label for label in (b"a", b"b", b"c", b"a"))


def _csv(folder: Path) -> bytes:
    return b'text,label\n"red, green",a\nnail drill,b\nhen,c\n'


def _parquet(folder: Path) -> bytes:
    import pyarrow.parquet

    out = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(_rows()), out, row_group_size=2)
    return out.getvalue()


def _arrow(folder: Path) -> bytes:
    import pyarrow.ipc

    found, out = pyarrow.Table.from_pylist(_rows()), io.BytesIO()
    with pyarrow.ipc.new_stream(out, found.schema) as writer:
        writer.write_table(found, max_chunksize=2)
    return out.getvalue()


def _rows() -> list[dict]:
    return [{"text": "red cat", "label": label} for label in ("a", "b", "c", "a")]


def _npz(folder: Path) -> bytes:
    out, ones = io.BytesIO(), np.ones((4, 6), np.int64)
    np.savez_compressed(out, input_ids=ones, attention_mask=ones, labels=np.arange(4) % 3)
    return out.getvalue()


def _toml(
    text: bytes, read_file: Callable[[Path], object], prepare: Callable[[Path], object] = str
) -> Callable:
    @contextmanager
    def toml(folder: Path) -> Iterator[Reader]:
        prepare(folder)
        path = folder / "settings.toml"

        def read(content: bytes) -> None:
            path.write_bytes(content)
            read_file(path)

        yield Reader([text], mutations.of_toml, read)

    return toml


def _settings(path: Path) -> None:
    """Read the tables of two commands, as they do."""
    from fleetune.broker.aggregation import aggregate
    from fleetune.broker.jobs.patience import Patience
    from fleetune.broker.jobs.settings import Job
    from fleetune.device_runtime.commands.train import train
    from fleetune.toolkit.configuration import resolve
    from fleetune.toolkit.flags import Part

    given = dict.fromkeys(
        ("artifact_dir", "mqtt", "out", "rounds", "clients", "job", "seed", "deadline_s", "gather_s")
    )
    resolve(
        aggregate, given, config=path, table="aggregate", parts={"job": Part(Job), "patience": Part(Patience)}
    )
    resolve(train, dict.fromkeys(("artifact_dir", "data", "out", "rules")), config=path, table="train")


def _simulation(path: Path) -> None:
    from fleetune.toolkit.simulation.config import load_config

    load_config(path)


@contextmanager
def run_json(folder: Path) -> Iterator[Reader]:
    """``run.json``: of a job, and of a simulation."""
    from fleetune.toolkit.simulation.records import read_report

    said = {
        "artifact": "tiny", "artifact_digest": "a" * 64, "arguments": {"work": {"seq_len": 8}}, "labels": ["a", "b"],
        "report": {"name": "x", "seed": 0, "rounds": 1, "finished": True, "devices": 2, "accuracy": 0.5},
    }  # fmt: skip

    def read(content: bytes) -> None:
        (folder / RUN).write_bytes(content)
        read_labels(folder), read_seq_len(folder), read_report(folder)

    yield Reader([json.dumps(said).encode()], mutations.of_json, read)


@contextmanager
def rounds_jsonl(folder: Path) -> Iterator[Reader]:
    """``rounds.jsonl`` of a simulation, mended and read."""
    from fleetune.toolkit.simulation.curves import read_curve
    from fleetune.toolkit.simulation.records import RoundRecord, mend

    report = {"name": "x", "seed": 0, "rounds": 2, "finished": True, "devices": 2, "accuracy": 0.5}
    (folder / RUN).write_text(json.dumps({"report": report}))
    records = [_round_record(RoundRecord, number) for number in range(3)]
    sample = b"".join(msgspec.json.encode(one) + b"\n" for one in records)

    def read(content: bytes) -> None:
        (folder / ROUNDS).write_bytes(content)
        read_curve(folder)
        mend(folder / ROUNDS, RoundRecord)

    yield Reader([sample], mutations.of_lines, read)


@contextmanager
def evaluation_json(folder: Path) -> Iterator[Reader]:
    """``evaluation.json`` of a run, as a plot reads it."""
    from fleetune.toolkit.run_figures import read_figures

    (folder / EVALUATIONS).write_bytes(added(b"", Evaluated(step=1, num_samples=3, loss=1.0, accuracy=0.5)))
    names = [{"name": name, "precision": 0.5, "recall": 0.5, "f1": 0.5, "support": 2} for name in "ab"]
    said = {"step": 1, "num_samples": 4, "loss": 1.0, "accuracy": 0.5, "data": "d.csv", "classes": names}
    said["confusion"] = [[1, 1], [0, 2]]

    def read(content: bytes) -> None:
        (folder / EVALUATION).write_bytes(content)
        read_figures(folder)

    yield Reader([json.dumps(said).encode()], mutations.of_json, read)


@contextmanager
def evaluations_jsonl(folder: Path) -> Iterator[Reader]:
    """The log of evaluations, which goes on whatever lies there, and as a plot reads it."""
    from fleetune.toolkit.run_figures import read_figures

    lines = [Evaluated(step=step, num_samples=3, loss=1.0, accuracy=0.5) for step in (1, 2, 3)]
    sample = reduce(added, lines, b"")

    def read(content: bytes) -> None:
        assert added(content, lines[0]).endswith(b"\n")
        (folder / EVALUATIONS).write_bytes(content)
        read_figures(folder)

    yield Reader([sample], mutations.of_lines, read)


def _round_record(kind: type, number: int) -> object:
    return kind(round=number, devices=2, time_s=float(number), accuracy=0.5, loss=1.0)


@contextmanager
def left(folder: Path) -> Iterator[Reader]:
    """The owner's record of what left: a damaged line is passed over."""
    files = MemoryFiles()
    record = Record(files)
    for number in (1, 2, 3):
        record.add(Left(when="2026-01-01T00:00:00Z", job="job", round=number, task_id=f"t-{number}", bytes=9))
    sample = files.read(NEWEST) or b""

    def read(content: bytes) -> None:
        files.write(NEWEST, content)
        record = Record(files)
        record.newest(5)
        record.add(Left(when="2026-01-01T00:00:00Z", job="job", round=4, task_id="t-4"))
        assert record.newest(1)[0].task_id == "t-4"

    yield Reader([sample], mutations.of_lines, read)


@contextmanager
def journal(folder: Path) -> Iterator[Reader]:
    """A simulation's journal."""
    from fleetune.toolkit.simulation.jobs import Done, Share, Task
    from fleetune.toolkit.simulation.journal import JOURNAL, Journal

    task = Task(kind="train", device="d", share=Share(path="x", rows=None), work=LocalWork(), adapter=b"abc")
    opened = Journal(folder, "digest")
    opened.keep(task, Done(adapter=b"x" * 50, losses=[1.0, 2.0], stats={"loss": 1.0}))
    opened.close()
    path = folder / JOURNAL

    def read(content: bytes) -> None:
        _replace(path, content)
        again = Journal(folder, "digest")
        try:
            again.find(task)
            again.keep(task, Done())
            assert again.size
        finally:
            again.close()

    yield Reader([_settled(path)], mutations.of_sqlite(folder / "scratch.sqlite"), read)


_RULES = b"nice = 1\nperiod_s = 5.0\nload = { max_share = 0.5 }\n[hours]\nwindows = ['22:00-06:00']\n[temperature]\nmax_c = 70\n"


@contextmanager
def certificate(folder: Path) -> Iterator[Reader]:
    """What stands beside keys of masks: DER, of which a stranger wrote all."""
    told, pairs = authority_of(folder / "trust", "a")
    authorities, scope, keys = read_authorities(told), Scope("job", "1-0"), (bytes(32), bytes([1]) * 32)
    pem, key = (Path(path).read_bytes() for path in pairs["a"])
    vouched = open_voucher(pem, key, None, device_id="a").vouch(scope, "a", *keys)
    peer = MaskPeer(place=1, device_id="a", mask_key=keys[0], share_key=keys[1], **vouched._asdict())

    def read(content: bytes) -> None:
        if said := problem_of_peer(scope, msgspec.structs.replace(peer, certificate=content)):
            raise WireError(said)
        if said := authorities.problem(content):
            raise WireError(said)

    yield Reader([peer.certificate], mutations.of_bytes, read)


@contextmanager
def authorities(folder: Path) -> Iterator[Reader]:
    """Who must have signed them, PEM."""
    told, path = authority_of(folder / "trust", "")[0], folder / "authorities.pem"

    def read(content: bytes) -> None:
        path.write_bytes(content)
        read_authorities(path)

    yield Reader([told.read_bytes(), 2 * told.read_bytes()], mutations.of_bytes, read)


_SETTINGS = (
    b"[train]\nartifact_dir = 'a'\ndata = 'd'\nout = 'o'\n[aggregate]\nartifact_dir = 'a'\nmqtt = 'mqtt://h'\n"
    b"out = 'o'\njob = 'home'\nrounds = 3\nclients = 2\nseed = 1\ndeadline_s = 9.5\n"
)
_SIMULATION = FILE.format(artifact=TINY).encode()

READERS: dict[str, Callable] = {
    "wire": wire,
    "packet": packet,
    "service": service,
    "agent": agent,
    "watcher": watcher,
    "ledger": ledger,
    "outbox": outbox,
    "checkpoint": checkpoint,
    "codec memory": codec_memory,
    "old residual": old_residual,
    "hidden cache": hidden_cache,
    "certificate": certificate,
    "authorities": authorities,
    "manifest": manifest,
    "graph": graph,
    "adapter": adapter,
    "adapter config": adapter_config,
    "generation config": _file(GENERATION, b'{"eos_token_id":[1,2]}', mutations.of_json, read_ends),
    "prompt": _file("prompt.txt", "Once upon a time in Zürich\n".encode(), mutations.of_bytes, read_prompt),
    "jsonl": _data("a.jsonl", _jsonl, mutations.of_lines),
    "csv": _data("a.csv", _csv, mutations.of_lines),
    "npz": _data("a.npz", _npz, mutations.of_npz),
    "label sets": label_sets,
    "numbers": numbers,
    "jsonl.gz": _data(
        "a.jsonl.gz", lambda folder: gzip.compress(_jsonl(folder)), mutations.of_gzip(mutations.of_lines)
    ),
    "csv.gz": _data(
        "a.csv.gz", lambda folder: gzip.compress(_csv(folder)), mutations.of_gzip(mutations.of_lines)
    ),
    "json": _data(
        "a.json", lambda folder: b"[%s]" % b",".join(_jsonl(folder).split(b"\n")[:-1]), mutations.of_json
    ),
    "tsv": _data("a.tsv", lambda folder: b"text\tlabel\nred\ta\nnail drill\tb\n", mutations.of_lines),
    "txt": _language("a.txt", b"turn the lamp on\r\n\nin the hall\n" * 3, mutations.of_bytes),
    "rules": _toml(_RULES, load_rules),
    "settings": _toml(_SETTINGS, _settings),
    "simulation": _toml(_SIMULATION, _simulation, write_config),
    "run.json": run_json,
    "rounds.jsonl": rounds_jsonl,
    "evaluation.json": evaluation_json,
    "evaluations.jsonl": evaluations_jsonl,
    "left.jsonl": left,
    "journal": journal,
}
if find_spec("jinja2"):
    READERS |= {
        "chats.jsonl": _language("a.jsonl", _CHATS, mutations.of_lines),
        "chat template": chat_template,
    }
if find_spec("pyarrow"):
    READERS |= {
        "parquet": _data("a.parquet", _parquet, mutations.of_bytes),
        "arrow": _data("a.arrow", _arrow, mutations.of_bytes),
    }
