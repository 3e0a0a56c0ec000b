"""A fleet as Prometheus reads it: the text exposition format, version 0.0.4.

Written by hand: names, labels and numbers of one snapshot, thirty lines, against one more library on the operator's machine.
Source: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

from fleetune.toolkit.watching.state import STATES, DeviceState, FleetState

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_ALWAYS = (*STATES, "idle", "fetching", "training", "evaluating", "masking", "delivering", "online")
Labels = Mapping[str, str]
Sample = tuple[Labels, float]


class _Metric(NamedTuple):
    name: str
    kind: str
    help: str
    samples: Iterable[Sample]


def exposition(state: FleetState) -> str:
    """Write a fleet down. What is not known, a loss before it is measured for example, has no line."""
    lines = []
    for metric in _metrics(state):
        samples = [_line(metric.name, labels, value) for labels, value in metric.samples]
        if samples:
            lines += [f"# HELP {metric.name} {metric.help}", f"# TYPE {metric.name} {metric.kind}", *samples]
    return "\n".join(lines) + "\n"


def _line(name: str, labels: Labels, value: float) -> str:
    told = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"{name}{{{told}}} {value!r}"


def _escaped(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")


def _metrics(state: FleetState) -> Iterator[_Metric]:
    job = state.job
    own = {"job": job.job}

    def of_job(name: str, help: str, value: float, kind: str = "gauge") -> _Metric:
        return _Metric(f"fleetune_{name}", kind, help, [(own, float(value))])

    yield of_job("aggregator_up", "1 while the aggregator is there.", job.aggregator == "here")
    yield of_job("round", "Number of the open round, or of the last one closed.", job.round)
    yield of_job("rounds", "Rounds in all; 0 where that is not known.", job.num_rounds)
    yield of_job("version", "The newest version of the adapter.", job.version)
    yield of_job(
        "dropped_messages_total", "Messages that the aggregator had no room for.", job.dropped, "counter"
    )
    standing = {"pending": job.num_pending, "accepted": job.num_accepted, "refused": job.num_refused}
    yield _Metric(
        "fleetune_round_devices",
        "gauge",
        "Devices of the open round, by where they stand.",
        [({**own, "standing": name}, float(value)) for name, value in standing.items()]
        if job.is_open
        else [],
    )
    yield _Metric(
        "fleetune_devices",
        "gauge",
        "Devices by state.",
        [({**own, "state": one}, float(state.counts.get(one, 0))) for one in _ALWAYS],
    )
    yield from _of_rounds(state, own)
    for name, kind, help, value_of in _OF_DEVICE:
        yield _Metric(f"fleetune_device_{name}", kind, help, list(_samples(state, own, value_of)))
    yield _Metric(
        "fleetune_device_info",
        "gauge",
        "1, with the version of fleetune on the device.",
        [({**own, "device": d.device_id, "version": d.software}, 1.0) for d in state.devices if d.software],
    )


def _of_rounds(state: FleetState, own: Labels) -> Iterator[_Metric]:
    """The newest figure of each kind, and what all rounds that are known carried."""
    newest: dict[str, float] = {}
    for figures in state.rounds:
        newest |= figures.measured
    words = {
        "loss": "Loss of the newest version that was measured.",
        "accuracy": "Its share of right answers, 0 to 1; of a language model of right next tokens.",
        "exact_match": "Its share of rows with all labels right, 0 to 1.",
        "r2": "R2 of its numbers, not below 0.",
        "perplexity": "e to its loss of a token.",
        "train_loss": "Mean of the devices' last local losses.",
        "epsilon": "Spent, of the device that was asked most often.",
    }
    for name, help in words.items():
        yield _Metric(f"fleetune_{name}", "gauge", help, [(own, newest[name])] if name in newest else [])
    seconds = [figures.seconds for figures in state.rounds if figures.round]
    yield _Metric("fleetune_round_seconds", "gauge", "Of the newest round.", [(own, s) for s in seconds[-1:]])


def _samples(
    state: FleetState, own: Labels, value_of: Callable[[DeviceState], float | None]
) -> Iterator[Sample]:
    for device in state.devices:
        value = value_of(device)
        if value is not None:
            yield {**own, "device": device.device_id}, float(value)


_OF_DEVICE: tuple[tuple[str, str, str, Callable[[DeviceState], float | None]], ...] = (
    ("up", "gauge", "1 while it is connected.", lambda d: d.is_online),
    ("paused", "gauge", "1 while its own rules keep it from working.", lambda d: d.is_paused),
    ("late", "gauge", "1 if its round closes before it can be done.", lambda d: d.is_late),
    ("slow", "gauge", "1 if its steps take far longer than the others'.", lambda d: d.is_slow),
    ("silent", "gauge", "1 if it is connected and tells nothing.", lambda d: d.is_silent),
    ("round", "gauge", "Round of the work that it has or had last.", lambda d: d.round if d.phase else None),
    ("steps", "gauge", "Steps of its work.", lambda d: d.steps or None),
    ("steps_done", "gauge", "Steps of its work that are done.", lambda d: d.step if d.steps else None),
    ("step_seconds", "gauge", "Seconds that a step takes of late.", lambda d: d.step_s or None),
    ("memory_bytes", "gauge", "Resident memory.", lambda d: d.memory_mb * 1e6 or None),
    ("temperature_celsius", "gauge", "Of its hottest part.", lambda d: d.temperature_c or None),
    (
        "sent_bytes_total",
        "counter",
        "Payload sent since its start.",
        lambda d: d.mb_sent * 1e6 if d.phase else None,
    ),
    (
        "received_bytes_total",
        "counter",
        "Payload received since its start.",
        lambda d: d.mb_received * 1e6 if d.phase else None,
    ),
)
