"""A step that takes longer than it may is stopped, and the engine works again: with real graphs that loop without end."""

import threading

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from tiny import draw_batch, noisy_adapter

from fleetune.device_runtime.contracts.artifact import open_artifact
from fleetune.device_runtime.contracts.plans import full
from fleetune.device_runtime.engine.engine import Setup
from fleetune.device_runtime.engine.loaders import onnx_loader
from fleetune.device_runtime.engine.stack import Stack
from fleetune.device_runtime.engine.watchdog import Watchdog
from fleetune.device_runtime.errors import ConfigError

HEAD = "head.train"


def endless(path):
    """The graph at ``path``, whose nodes wait for a loop that does not end."""
    body = helper.make_graph(
        [helper.make_node("Identity", ["on"], ["goes_on"]), helper.make_node("Add", ["x", "one"], ["y"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("x", TensorProto.FLOAT, []),
        ],
        [
            helper.make_tensor_value_info("goes_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, []),
        ],
    )
    model = onnx.load(path)
    one, on = (
        helper.make_tensor(name, kind, [], [1])
        for name, kind in (("one", TensorProto.FLOAT), ("on_at_first", TensorProto.BOOL))
    )
    model.graph.initializer.extend([one, on])
    output = model.graph.output[0].name
    node = next(node for node in model.graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "before"
    loop = helper.make_node("Loop", ["", "on_at_first", "one"], ["never"], body=body)
    model.graph.node.extend([loop, helper.make_node("Add", ["before", "never"], [output])])
    path.with_name("endless.onnx").write_bytes(model.SerializeToString())
    return path.with_name("endless.onnx")


@pytest.mark.parametrize(("threads", "rows"), [(1, 3), (2, 8)], ids=["one lane", "two lanes"])
def test_a_graph_that_loops_is_stopped_and_the_next_step_is_done(word_artifact, tmp_path, threads, rows):
    artifact = open_artifact(word_artifact)
    real, loops = onnx_loader(threads, "cpu"), [True]
    copy = tmp_path / f"{HEAD}.onnx"
    copy.write_bytes((word_artifact / "graphs" / f"{HEAD}.onnx").read_bytes())
    bad = endless(copy)

    def opened(path, threads):
        return real.open(bad if loops and path.stem == HEAD else path, threads)

    batch, adapter = draw_batch(artifact.manifest, rows, 6), noisy_adapter(artifact)
    with Stack(artifact, real, Setup(threads)) as calm:
        wanted = calm.step(batch, full(4), adapter)
    with Stack(artifact, real._replace(open=opened), Setup(threads, most_step_s=0.2)) as engine:
        with pytest.raises(ConfigError, match=r"most_step_seconds: a step was stopped, .* than 0.2 s"):
            engine.step(batch, full(4), adapter)
        loops.clear()
        engine._chains.clear()
        engine._watchdog._most_s = 1e9
        found = engine.step(batch, full(4), adapter)
    assert found.loss == wanted.loss
    assert all(np.array_equal(found.grads[name], wanted.grads[name]) for name in wanted.grads)


class Clock:
    """A time that stands."""

    now = 0.0

    def __call__(self):
        return self.now


def test_who_is_done_in_time_is_not_stopped_and_an_error_of_its_own_is_its_own():
    told, clock = [], Clock()
    dog = Watchdog(1.0, told.append, clock=clock)
    for _ in range(3):
        with dog:
            clock.now += 0.9
    with pytest.raises(KeyError), dog:
        raise KeyError
    dog.close()
    assert told == []


def test_others_at_work_are_stopped_too_and_all_may_run_when_the_last_has_left():
    clock, told, stopped = Clock(), [], threading.Event()

    def stop(is_stopped):
        told.append(is_stopped)
        stopped.set()

    dog, failed = Watchdog(1.0, stop, clock=clock), []

    def work():
        try:
            with dog:
                ready.release()
                stopped.wait(30.0)
                raise RuntimeError("stopped")
        except ConfigError:
            failed.append(1)

    ready = threading.Semaphore(0)
    workers = [threading.Thread(target=work) for _ in range(2)]
    for worker in workers:
        worker.start()
    for _ in workers:
        ready.acquire()
    clock.now = 5.0
    for worker in workers:
        worker.join(30.0)
    dog.close()
    assert (told, len(failed)) == ([True, False], 2)


def test_without_a_limit_there_is_no_thread():
    before = threading.active_count()
    with Watchdog(0.0, pytest.fail):
        assert threading.active_count() == before
