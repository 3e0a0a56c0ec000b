"""Whether the simulator's clock is honest: four real device processes under CPU limits, and the same four simulated.

Each device may use a share of one core, kept by the kernel (cgroup's CFS quota; needs root). The simulation has profiles whose
``slowdown`` is one over that share, and a network as quick as this machine's own. What is compared is the time of a round.
"""

import itertools
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from benchmarks.federation import find_data, mosquitto
from benchmarks.measuring.subjects import artifact_of
from fleetune.broker.aggregation import aggregate
from fleetune.broker.jobs.settings import Job
from fleetune.device_runtime.contracts.run_file import ROUNDS
from fleetune.device_runtime.contracts.work import LocalWork, OptimizerSpec, PolicySpec
from fleetune.device_runtime.errors import ConfigError
from fleetune.toolkit.processes import Member, fleet
from fleetune.toolkit.simulation.simulate import simulate

SHARES = (0.4, 0.35, 0.3, 0.2)
"""Of one core, by device; together less than two cores, for the aggregator works too."""
NUM_ROUNDS, STEPS, LINES_EACH, PERIOD_US = 6, 12, 200, 100_000
CONTROLLER = Path("/sys/fs/cgroup/cpu")
POLICIES = {"full": PolicySpec(), "half": PolicySpec(name="exact-k", drop=0.5)}
Say = Callable[[str], None]


def measure(say: Say, *, repeats: int = 2) -> dict[str, Any]:
    """Seconds of a round, the first left out (graphs are opened in it), real and simulated, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        artifact, files = artifact_of("minilm", root, say=say), _files(root)
        rows = []
        for policy, spec in POLICIES.items():
            work = LocalWork(
                policy=spec, steps=STEPS, batch_size=16, seq_len=32, codec="fp16", optimizer=OptimizerSpec()
            )
            real = [_real(root / f"{policy}-{i}", artifact, files, work, say) for i in range(repeats)]
            virtual = _virtual(root / f"{policy}-virtual", artifact, root, work, say)
            seconds = statistics.median(s for rounds in real for s in rounds)
            rows.append({"policy": policy, "real_s": seconds, "simulated_s": virtual})
            rows[-1]["ratio"] = round(virtual / seconds, 3)
            say(f"{policy}: {seconds:.2f} s a round, simulated {virtual:.2f} s, ratio {rows[-1]['ratio']}")
    return {"benchmark": "clock", "repeats": repeats, "rows": rows}


def _files(root: Path) -> list[Path]:
    """One file a device, and all of them together for the simulation, with whose each line is."""
    import gzip

    text = gzip.decompress((find_data() / "banking77" / "train.jsonl.gz").read_bytes()).decode()
    lines = text.splitlines()[:: 10003 // (LINES_EACH * len(SHARES))][: LINES_EACH * len(SHARES)]
    files = []
    for i in range(len(SHARES)):
        own = [json.loads(line) for line in lines[i * LINES_EACH : (i + 1) * LINES_EACH]]
        files.append(root / f"device-{i}.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in own), encoding="utf-8")
    together = [json.loads(line) | {"owner": str(i // LINES_EACH)} for i, line in enumerate(lines)]
    (root / "all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in together), encoding="utf-8")
    return files


def _real(root: Path, artifact: Path, files: list[Path], work: LocalWork, say: Say) -> list[float]:
    with mosquitto(root) as url, fleet() as members:
        for i, file in enumerate(files):
            options = ["--data", file, "--mqtt", url, "--job", "clock", "--id", f"device-{i}"]
            options += ["--state", root / f"d{i}", "--threads", 1, "--least-effective", 0]
            members.start(f"device-{i}", root / f"d{i}", [str(artifact), "--json", *map(str, options)])
        with _limits(members.members):
            report = aggregate(
                artifact,
                mqtt=url,
                job=Job("clock", rounds=NUM_ROUNDS, clients=len(SHARES)),
                out=root / "run",
                work=work,
                on_round=lambda row: say(f"round {row.round}: {row.seconds:.2f} s"),
            )
            members.wait(60)
    return [row.seconds for row in report.history[2:]]


@contextmanager
def _limits(members: list[Member]) -> Iterator[None]:
    """Give each process its share of a core; ConfigError where the kernel's controller cannot be written."""
    folders = [CONTROLLER / f"fleetune-{os.getpid()}-{i}" for i in range(len(members))]
    try:
        for folder, member, share in zip(folders, members, SHARES, strict=True):
            folder.mkdir()
            (folder / "cpu.cfs_period_us").write_text(str(PERIOD_US))
            (folder / "cpu.cfs_quota_us").write_text(str(int(share * PERIOD_US)))
            (folder / "cgroup.procs").write_text(str(member.process.pid))
        yield
    except OSError as exc:
        raise ConfigError(f"{CONTROLLER}: {exc.strerror}: no CPU limits can be set here") from exc
    finally:
        for member in members:
            member.process.kill()  # if the job ended early; a folder of a process cannot be removed
            member.process.wait(10)
        for folder in folders:
            if folder.is_dir():
                folder.rmdir()


def _virtual(out: Path, artifact: Path, root: Path, work: LocalWork, say: Say) -> float:
    profiles = [
        f'device-{i} = {{ slowdown = {1 / share}, network = "here" }}' for i, share in enumerate(SHARES)
    ]
    config = root / "clock.toml"
    config.write_text(
        "\n".join(
            [
                'name = "clock"',
                f"artifact = {json.dumps(str(artifact))}",
                f"rounds = {NUM_ROUNDS}",
                f"clients = {len(SHARES)}",
                f"timings = {json.dumps(str(root / 'timings.json'))}",
                f"data = {{ train = {json.dumps(str(root / 'all.jsonl'))}, test = {json.dumps(str(root / 'device-0.jsonl'))} }}",
                'partition = { kind = "by", column = "owner" }',
                "patience = { deadline_s = 0 }",
                "[networks.here]",
                "down_bytes_s = 1e9",
                "up_bytes_s = 1e9",
                "latency_s = 0.0005",
                "[profiles]",
                *profiles,
                "[fleet.profiles]",
                *(f"device-{i} = 1" for i in range(len(SHARES))),
                "[work]",
                *(f"{key} = {json.dumps(value)}" for key, value in _plain(work).items()),
                f"policy = {{ name = {json.dumps(work.policy.name)}, drop = {work.policy.drop} }}",
            ]
        ),
        encoding="utf-8",
    )
    simulate(config, out=out, workers=1, on_note=say)
    lines = (out / ROUNDS).read_text().splitlines()
    times = [json.loads(line)["time_s"] for line in lines]
    return statistics.median(after - before for before, after in itertools.pairwise(times))


def _plain(work: LocalWork) -> dict[str, Any]:
    names = ("steps", "batch_size", "seq_len", "codec")
    return {name: msgspec.structs.asdict(work)[name] for name in names}
