"""When a run's checkpoints are written, and what a signal finds: with a trainer that only counts."""

import signal
from types import SimpleNamespace

import pytest

from fleetune.device_runtime.errors import StateError
from fleetune.device_runtime.training.resumable import Pace, finish


class Counting:
    """A run of ten steps of ten seconds each; ``during`` is called in each step, ``saved`` lists the steps of its checkpoints."""

    def __init__(self, during=lambda step: None, full_disk=()):
        self.step_index, self.total_steps, self.saved, self.now = 0, 10, [], 0.0
        self._during, self._full_disk = during, full_disk

    @property
    def done(self):
        return self.step_index == self.total_steps

    def step(self):
        self._during(self.step_index)
        self.step_index += 1
        self.now += 10
        return SimpleNamespace(step=self.step_index - 1)

    def save(self, path):
        if self.step_index in self._full_disk:
            raise StateError(f"{path}: cannot be written: full")
        self.saved.append(self.step_index)


def run(trainer, *, steps=0, seconds=0.0, wait=lambda save: None, **more):
    finish(trainer, "c", pace=Pace(steps, seconds), wait=wait, clock=lambda: trainer.now, **more)
    return trainer.saved


@pytest.mark.parametrize(
    ("steps", "seconds", "saved"),
    [
        (4, 0, [4, 8, 10]),
        (0, 25, [3, 6, 9, 10]),
        (4, 25, [3, 4, 7, 8, 10]),
        (0, 0, [10]),
        (5, 0, [5, 10]),
    ],
)
def test_checkpoints_are_due_by_steps_and_by_time_and_at_the_end_once(steps, seconds, saved):
    assert run(Counting(), steps=steps, seconds=seconds) == saved


def test_a_pause_saves_what_is_not_saved_yet():
    trainer = Counting()
    assert run(trainer, wait=lambda save: save() if trainer.step_index in (0, 3) else None) == [3, 10]


def test_a_run_that_is_done_writes_nothing():
    trainer = Counting()
    trainer.step_index = 10
    assert run(trainer, steps=1) == []


def test_a_full_disk_stops_no_run(caplog):
    assert run(Counting(full_disk=(4,)), steps=4) == [8, 10]
    assert "step 4: no checkpoint: c: cannot be written: full" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_in_a_step_stops_it_behind_the_step_and_saves(number):
    said = []
    trainer = Counting(lambda step: signal.raise_signal(number) if step == 6 else None)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(trainer, tell=said.append, again="again goes on")
    assert trainer.saved == [7]
    assert said == [
        "stopping after this step; once more to stop at once",
        "stopped at step 7 of 10; again goes on",
    ]


def test_a_second_signal_in_a_step_saves_nothing_of_it():
    said = []

    def twice(step):
        if step == 6:
            signal.raise_signal(signal.SIGINT)
            trainer.now += 1
            signal.raise_signal(signal.SIGINT)

    trainer = Counting(twice)
    with pytest.raises(KeyboardInterrupt):
        run(trainer, steps=5, tell=said.append)
    assert (trainer.saved, trainer.step_index) == ([5], 6)
    assert [text for text in said if text.startswith("stopped")] == []


def test_a_signal_in_a_pause_stops_it_at_once():
    trainer = Counting()

    def wait(save):
        if trainer.step_index == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(trainer, wait=wait)
    assert trainer.saved == [2]


def test_a_signal_that_comes_twice_is_one():
    """As ``timeout`` sends it, to its child and to the whole group: the second one may come while the run is saved."""
    said, trainer = [], Counting()
    keep = trainer.save

    def on_step(report):
        if report.step == 6:
            signal.raise_signal(signal.SIGINT)

    def save(path):
        signal.raise_signal(signal.SIGINT)
        keep(path)

    trainer.save = save
    with pytest.raises(KeyboardInterrupt):
        run(trainer, on_step=on_step, tell=said.append, again="again goes on")
    assert trainer.saved == [7]
    assert said[-1] == "stopped at step 7 of 10; again goes on"


def test_nobody_is_promised_to_go_on_from_what_was_not_saved():
    said = []
    trainer = Counting(lambda step: signal.raise_signal(signal.SIGINT) if step == 6 else None, full_disk=(7,))
    with pytest.raises(KeyboardInterrupt):
        run(trainer, tell=said.append, again="again goes on")
    assert said[-1] == "stopped at step 7 of 10"
