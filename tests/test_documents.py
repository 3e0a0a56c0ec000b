"""What README and the pages for operators and boards tell people to type is typed, word for word, with a real Mosquitto.

What differs from a person's machine: a password stands where a page has ``secret``, what would run on for days is in the
background, and see :mod:`machine`. Where pages speak of two machines, both are this one.
"""

import json
import shutil
import subprocess

import pytest
from documents import Block, blocks
from machine import Machine
from paths import ROOT

pytestmark = pytest.mark.slow
README, OPERATE, BOARD = ROOT / "README.md", ROOT / "docs" / "operate.md", ROOT / "docs" / "raspberry-pi.md"
ENDLESS = ("fleetune device", "fleetune aggregate")
PASSWORDS = "Passwords in the place of certificates"
LATER = "# afterwards"
HALL = {"kitchen": "hall", "mine": "held-out", '"state"': '"state_hall"', "device.toml": "hall.toml"}
JUDGE = {
    "kitchen": "judge",
    '"state"': '"state_judge"',
    "device.toml": "judge.toml",
    "device artifact": "device artifact --role evaluate",
}
"""What stands in place of what, where the page that speaks of one device is typed for another."""
EXPORT = "fleetune export MODEL --task sequence-classification --labels labels.txt --out artifact"


@pytest.fixture
def machine(tmp_path_factory):
    """A machine with a checkout, a model and people's data in its folder."""
    machine = Machine(tmp_path_factory.mktemp("machine"))
    tracked = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
        .stdout.decode()
        .split("\0")
    )
    for name in filter(None, tracked):
        (machine.folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, machine.folder / name, follow_symlinks=False)
    _save_model(machine.folder / "MODEL")
    (machine.folder / "labels.txt").write_text("on\noff\n")
    for name in ("mine", "held-out"):
        lines = [
            {"text": f"turn the {place} light {word}", "label": word}
            for place in ("hall", "kitchen")
            for word in ("on", "off") * 32
        ]
        (machine.folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    shutil.copy(ROOT / "docs" / "fleetune-device.service", machine.folder)
    return machine


def _save_model(folder):
    import torch
    import transformers
    from pretrained import MINILM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
    config = transformers.BertConfig(vocab_size=30522, max_position_embeddings=64, num_labels=2, **sizes)
    transformers.BertForSequenceClassification(config).save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)


class Script:
    """Lines of a shell script, made of pages; ``later`` are those that a page wants typed at the end."""

    def __init__(self, start: str) -> None:
        self.lines, self.later = [start], [""]

    def section(self, page, heading: str, *, user: str = "", only: str = "", **other: str) -> "Script":
        """Everything under a heading, files and commands.

        ``user``: whose login is asked for; ``only``: lines with one of these words; ``other``: words to stand in place of others.
        """
        found = [block for block in blocks(page) if block.heading == heading]
        assert found, f"{page.name} has no code under {heading!r}"
        for block in found:
            self._add(block, user, only.split(), other)
        return self

    def say(self, text: str) -> "Script":
        self.lines.append(text)
        return self

    def __str__(self) -> str:
        ends = 'for job in $(jobs -p); do wait "$job" || { tail -n 20 *.log; exit 1; }; done\ntail -n 3 *.log'
        return "\n".join([*self.lines, ends, *self.later])

    def _add(self, block: Block, user: str, only: list[str], other: dict[str, str]) -> None:
        text = block.text.replace("PASSWORD=secret", f"PASSWORD=$(sed -n 's/.*PASSWORD=//p' {user}.env)")
        for word, instead in other.items():
            text = text.replace(word, instead)
        block = block._replace(text=text)
        if block.file:
            self.lines.append(f"cat > {block.file} <<'END'\n{text}END")
        elif block.commands:
            typed = [line for line in text.splitlines() if not only or any(word in line for word in only)]
            for line in typed:
                (self.later if LATER in line else self.lines).append(_in_background(line))


def _in_background(line: str) -> str:
    """A command that goes on until the job is over is not waited for."""
    return (
        f"started=$((${{started:-0}} + 1)); {line.partition(' #')[0]} > part$started.log 2>&1 &"
        if line.strip().startswith(ENDLESS)
        else line
    )


def test_the_three_quick_starts(machine):
    """The server is the one of the operator's page; its authority is one that the system trusts."""
    model, boards, fleet = (block.heading for block in blocks(README) if block.heading.startswith("You "))
    script = Script(machine.make_environment()).section(README, model)
    script.section(OPERATE, PASSWORDS).say("export SSL_CERT_FILE=$PWD/ca.crt")
    script.section(README, boards, user="kitchen")
    script.say("export HOME=$PWD/hall").section(
        README, boards, user="hall", only="export device", kitchen="hall", mine="held-out"
    )
    script.section(README, fleet, user="aggregator")
    machine.run(str(script))
    assert (machine.folder / "adapter" / "adapter_model.safetensors").is_file()
    assert (machine.folder / "run-home" / "adapter" / "adapter_model.safetensors").is_file()


def test_the_operators_page(machine):
    script = Script(machine.make_environment()).say("pip install --quiet '.[export,trust]'").say(EXPORT)
    script.section(OPERATE, "The MQTT server").section(OPERATE, "The aggregator").section(
        OPERATE, "The devices"
    )
    script.section(OPERATE, "The devices", **HALL)
    script.section(OPERATE, "The devices", **JUDGE)
    machine.run(str(script))
    run = json.loads((machine.folder / "run" / "run.json").read_text())["report"]
    assert run["rounds"] == len(run["history"]) - 1 == 20
    assert run["history"][-1]["accuracy"] is not None


def test_the_board_page(machine):
    script = Script(machine.make_environment()).say("pip install --quiet '.[export,trust]'").say(EXPORT)
    script.section(OPERATE, "The MQTT server")
    for heading in ("Install", "First run", "As a service"):
        script.section(BOARD, heading)
    script.section(OPERATE, "The devices", **HALL).section(OPERATE, "The aggregator")
    ends = "timeout 60 sh -c 'until grep \"rounds are done\" /var/lib/journal; do sleep 1; done'"
    machine.run(f"{script}\n{ends}\ncp /var/lib/journal journal")
    assert "round 20" in (machine.folder / "journal").read_text()
