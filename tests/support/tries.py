"""Command lines, folders and files as people get them wrong: a number is a try, the same one every time."""

import random
import shlex
import shutil
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import msgspec
from spoil import spoil

from fleetune.device_runtime.arrays import sha256_of
from fleetune.device_runtime.contracts.artifact import MANIFEST
from fleetune.toolkit.cli import COMMANDS

LINES = {
    "train": "train artifact --data words.csv --out new --steps 2 --batch-size 4 --threads 1",
    "train lines": "train artifact --data words.jsonl --eval words.csv --out new --steps 2 --threads 1 "
    "--policy exact-k --drop 0.5",
    "train arrays": "train artifact --data words.npz --out new --steps 2 --threads 1 --optimizer sgd",
    "train on": "train artifact --config settings.toml --data words.csv --adapter run/adapter "
    "--out new --steps 1 --rules rules.toml",
    "resume": "train artifact --data words.csv --out stopped --steps 6 --batch-size 4 --threads 1 --checkpoint-every 1",
    "predict": "predict artifact --text red --threads 1",
    "predict run": "predict artifact --run run --data words.csv --threads 1",
    "inspect": "inspect artifact",
    "selfcheck": "selfcheck artifact --threads 1",
    "merge": "merge run --out new",
    "aggregate": "aggregate artifact --mqtt {url} --job home --rounds 1 --clients 1 --gather-s 0.1 --deadline-s 0.1 "
    "--extensions-max 0 --timeout-s 0.5 --out new",
    "aggregate on": "aggregate artifact --mqtt {url} --job home --rounds 2 --clients 1 --gather-s 0.1 --deadline-s 0.1 "
    "--extensions-max 0 --timeout-s 0.5 --evaluation-s 0.1 --out federation",
    "device": "device artifact --data words.csv --mqtt {url} --job home --state new --idle-limit-s 0.2 "
    "--timeout-s 0.5 --threads 1",
    "device on": "device artifact --data words.csv --mqtt {url} --job home --id kitchen --state state --idle-limit-s 0.2 "
    "--timeout-s 0.5 --threads 1",
    "train less": "train artifact --data words.csv --out new --steps 2 --threads 1 --policy coto --drop 0.5 --schedule falling "
    "--horizon 2 --protected 1 --protect effect --head-start class-mean",
    "train rows": "train artifact --data words.csv --out new --steps 2 --threads 1 --policy exact-k --drop 0.5 --gates row "
    "--hidden-cache-mb 1",
    "aggregate auto": "aggregate artifact --mqtt {url} --job home --rounds 1 --clients 1 --gather-s 0.1 --deadline-s 0.1 "
    "--extensions-max 0 --timeout-s 0.5 --policy auto --explore ucb --held-out 0.2 --personal 1 --head-start class-mean "
    "--out new",
    "simulate": "simulate simulation.toml --out new --workers 1 --no-charts --set work.steps=1",
    "simulate on": "simulate simulation.toml --out runs/tiny-0 --workers 1 --no-charts",
    "compare": "compare runs --of tiny --to 0.95,0.99",
    "configure": "broker --configure new --password-file logins.txt --user root",
    "broker": "broker --port 0",
    "bench": "bench nothing",
}
WITH_TORCH = {
    "export": "export model --task sequence-classification --labels labels.txt --out new",
    "export adapter": "export model --task sequence-classification --labels labels.txt --adapter adapter --out new",
    "merge full": "merge adapter --full --model model --labels labels.txt --out new",
    "demo": "demo --data words.csv --out new --rounds 1 --devices 1",
}
_OPTIONS = {
    command.__name__: [
        (f"--{p.name.replace('_', '-')}", str(p.annotation))
        for p in signature(command).parameters.values()
        if p.kind is p.KEYWORD_ONLY
    ]
    for command in COMMANDS
}
STOPPED_AFTER_S = {"broker": 0.4, "demo": 1.0, "aggregate": 0.6, "aggregate on": 0.6, "aggregate auto": 0.6}
"""These go on by themselves until they are told to stop."""

_NUMBERS = (
    "-1",
    "0",
    "1",
    "3",
    "0.5",
    "-0.5",
    "1e-9",
    "nan",
    "inf",
    "1e309",
    "9223372036854775807",
    "18446744073709551616",
    "1000000007",
)
_VALUES = (
    "",
    " ",
    "-1",
    "0",
    "1",
    "3",
    "nan",
    "inf",
    "1e309",
    "9223372036854775807",
    "18446744073709551616",
    "1e-320",
    "0x10",
    "1_000",
    "ä",
    "\u202e",
    "a\nb",
    "\x1b[31m",
    "..",
    "/dev/null",
    "/proc/nothing/here",
    "missing",
    "artifact",
    "words.csv",
    "run",
    "settings.toml",
    "{0}",
    "%s",
    "~",
    "a,b",
    ",",
    "[",
    "*",
    "mqtt://",
    "mqtts://127.0.0.1:1",
    "http://x",
    "mqtt://u:p/w@h",
    "mqtt://127.0.0.1:1/#?version=9",
    "x" * 5000,
    "true",
    "None",
    "fp16",
    "int8",
    "exact-k",
    "topk",
    "evaluate",
    "fedavgm",
    "product",
    "auto",
    "growing",
    "dropbp",
    "coto",
    "tail",
    "effect",
    "class-mean",
    "lora-a",
    "seed=-1",
    "work.policy.name=auto",
    "rounds=1e300",
    "causal-lm",
    "cuda",
    "-",
    "--",
    "--json",
    "-v",
)


class Try(NamedTuple):
    """One of many: what is typed, in a folder of its own, and what was done to its files."""

    number: int
    line: str
    words: list[str]
    spoilt: list[str]

    def __str__(self) -> str:
        return f"try {self.number} ({', '.join(self.spoilt) or 'files as they were'}): fleetune {shlex.join(self.words)}"


def draw(number: int, lines: dict[str, str], folder: Path, *, url: str) -> Try:
    """Spoil a copy of the world in ``folder`` and a line of ``lines``, one to three times in all."""
    rng = random.Random(number)
    line = rng.choice(sorted(lines))
    words = lines[line].format(url=url).split()
    spoilt = []
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if rng.random() < 0.5:
            words = _mistyped(words, rng)
        elif places := _places(words, folder):
            spoilt.append(_spoil(_file(rng.choice(places), rng), folder, rng))
    return Try(number, line, words, spoilt)


def _mistyped(words: list[str], rng: random.Random) -> list[str]:
    words = list(words)
    at = rng.randrange(1, len(words)) if len(words) > 1 else 0
    way = rng.random()
    if way < 0.6:
        options = _OPTIONS.get(words[0])
        words += _with_value(rng.choice(options), rng) if options else [rng.choice(_VALUES)]
    elif way < 0.85:
        words[at] = rng.choice(_NUMBERS if words[at].replace(".", "").isdigit() else _VALUES)
    elif way < 0.9:
        del words[at]
    else:
        words.insert(at, rng.choice([*_VALUES, "--nothing", *words]))
    return words


def _with_value(option: tuple[str, str], rng: random.Random) -> list[str]:
    name, kind = option
    if "bool" in kind:
        return [rng.choice([name, name.replace("--", "--no-", 1)])]
    if rng.random() < 0.03:
        return [name]
    is_number = "int" in kind or "float" in kind
    return [name, rng.choice(_NUMBERS if is_number and rng.random() < 0.95 else _VALUES)]


def _places(words: list[str], folder: Path) -> list[Path]:
    """Files of the world that these words name, and folders with a file in them."""
    usual = {path.name for path in folder.iterdir()}
    named = [folder / word for word in words if word.split("/")[0] in usual]
    return [
        path
        for path in named
        if path.is_file() or (path.is_dir() and any(p.is_file() for p in path.rglob("*")))
    ]


def _file(place: Path, rng: random.Random) -> Path:
    """One file in it, the graphs of an artifact less often than their number."""
    if place.is_file():
        return place
    files = sorted(p for p in place.rglob("*") if p.is_file())
    few = [p for p in files if p.parent.name != "graphs"] if rng.random() < 0.8 else files
    return rng.choice(few or files)


def _spoil(path: Path, folder: Path, rng: random.Random) -> str:
    done = spoil(path, rng)
    manifest = folder / "artifact" / MANIFEST
    if path.is_relative_to(manifest.parent) and path.is_file() and path != manifest and rng.random() < 0.7:
        _vouch(manifest, path)
        done += " and vouched for"
    return done


def _vouch(manifest: Path, path: Path) -> None:
    """Have the manifest say of a file what it is now, as who made the whole artifact would."""
    try:
        tree = msgspec.json.decode(manifest.read_bytes())
    except (OSError, msgspec.MsgspecError):
        return  # spoilt itself
    sha256, size = sha256_of(path), path.stat().st_size
    if isinstance(tree, dict) and isinstance(tree.get("files"), dict):
        tree["files"][str(path.relative_to(manifest.parent))] = {"sha256": sha256, "size_bytes": size}
        manifest.write_bytes(msgspec.json.encode(tree))


def copy_world(world: Path, folder: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(world, folder, symlinks=True))
