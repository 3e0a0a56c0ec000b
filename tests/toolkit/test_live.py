"""Progress as people see it: on a pretended terminal, and piped."""

import io
import logging
import re
import sys
from types import SimpleNamespace

import pytest
from rich.console import Console

from fleetune.broker.store.rows import Row
from fleetune.toolkit import live
from fleetune.toolkit.commands.running import _OnStderr

ROWS = [
    Row(round=0, devices=0, loss=2.0, accuracy=0.1, waited_s=111.2),
    Row(round=1, devices=2, train_loss=1.5, bytes_down=2000, bytes_up=1_500_000, seconds=20.0),
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def log():
    """A logger as the command line makes it."""
    log = logging.getLogger("fleetune.trial")
    handler = _OnStderr()
    log.addHandler(handler)
    log.propagate = False
    yield log
    log.removeHandler(handler)


def plain(text):
    """What is on a terminal's screen and in its scrollback: lines painted over are gone."""
    lines = [""]
    for part in re.split(r"(\n|\r|\x1b\[[0-9;?]*[A-Za-z])", text):
        if part == "\n":
            lines.append("")
        elif part == "\x1b[1A":
            lines.pop()
        elif part in ("\r", "\x1b[2K"):
            lines[-1] = ""
        elif not part.startswith("\x1b"):
            lines[-1] += part
    return [line.rstrip() for line in lines if line.strip()]


def test_rows_are_lines_below_one_header():
    out = io.StringIO()
    with live.rounds(Console(file=out, soft_wrap=True)) as show:
        show("round 1: 1 of 2 devices here: kitchen; waiting for 1 more")
        for row in ROWS:
            show(row)
    assert [line.split() for line in out.getvalue().splitlines()] == [
        ["round", "1:", "1", "of", "2", "devices", "here:", "kitchen;", "waiting", "for", "1", "more"],
        ["round", "devices", "trained", "loss", "accuracy", "down", "up", "seconds"],
        ["0", "0", "-", "2.0000", "0.100", "0", "B", "0", "B", "-"],
        ["1", "2", "1.5000", "-", "-", "2.0", "kB", "1.5", "MB", "20.0"],
    ]


def test_on_a_terminal_no_warning_is_painted_over_and_the_header_is_there_once(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", Terminal())
    out = Terminal()
    console = Console(file=out, force_terminal=True, width=100, soft_wrap=True)
    with live.rounds(console) as show, live.messages(console) as note:
        note("round 1: 1 of 2 devices here: kitchen; waiting for 1 more")
        show(ROWS[0])
        log.warning("round 1 closes at its deadline without hall")
        show(ROWS[1])
        log.warning("round 2: kitchen declined: no room")
    found = plain(out.getvalue())
    assert found[0] == "round 1: 1 of 2 devices here: kitchen; waiting for 1 more"
    assert [line.split()[0] for line in found[1:]] == ["round", "0", "round", "1", "round"]
    assert found[3] == "round 1 closes at its deadline without hall"
    assert found[5] == "round 2: kitchen declined: no room"
    assert sys.stderr.getvalue() == ""


def stepped(*steps):
    out = Terminal()
    with live.steps(Console(file=out, force_terminal=True, width=100)) as show:
        for step in steps:
            show(SimpleNamespace(step=step, total_steps=2, loss=1.5, seconds=0.1))
    return plain(out.getvalue())


def test_a_bar_stays_if_there_were_steps_and_goes_if_there_were_none():
    (line,) = stepped(0, 1)
    assert line.startswith("step 2/2 ")
    assert "loss 1.5000" in line
    assert stepped() == []


def test_a_bar_of_samples_leaves_nothing_behind_and_elsewhere_there_are_lines(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    out, piped = Terminal(), io.StringIO()
    terminal = Console(file=out, force_terminal=True, width=100)
    for console in (terminal, Console(file=piped)):
        with live.samples(console) as show:
            for now[0], done in ((1.0, 32), (6.0, 64), (7.0, 96)):
                show(SimpleNamespace(done=done, total=600))
        now[0] = 0.0
    assert "96/600" in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert plain(out.getvalue()) == []
    assert piped.getvalue() == "64 of 600 samples\n"


def test_a_log_that_goes_to_a_file_goes_there_and_not_to_the_terminal(log, monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    out = Terminal()
    with live.rounds(Console(file=out, force_terminal=True, width=100)) as show:
        log.warning("round 1 closes at its deadline without hall")
        show(ROWS[0])
    assert sys.stderr.getvalue() == "round 1 closes at its deadline without hall\n"
    assert "deadline" not in out.getvalue()


def test_a_job_with_noise_has_a_column_for_epsilon():
    fields = {"round": 1, "devices": 2, "train_loss": None, "loss": None, "accuracy": None, "seconds": 1.0}
    row = SimpleNamespace(**fields, bytes_down=1, bytes_up=1, epsilon=4.3772)
    assert live.columns(row)[-1] == "epsilon"
    assert live.cells(row)[-1] == "4.377"
    row.epsilon = None
    assert len(live.columns(row)) == len(live.cells(row)) == len(live.COLUMNS)
