import signal
import threading

import pytest

from fleetune.device_runtime.training.signals import Held


@pytest.fixture
def handlers():
    """Puts back what the tests set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def block(done, *numbers, apart_s=1.0):
    now = iter(range(99))
    with Held(lambda: done.append("told"), clock=lambda: apart_s * next(now)):
        for number in numbers:
            signal.raise_signal(number)
            done.append("went on")


def test_a_signal_waits_for_the_end_of_the_block(handlers):
    done = []
    with pytest.raises(KeyboardInterrupt):
        block(done, signal.SIGINT)
    assert done == ["told", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_second_one_does_not_wait(handlers):
    done = []
    with pytest.raises(KeyboardInterrupt):
        block(done, signal.SIGTERM, signal.SIGINT)
    assert done == ["told", "went on"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_a_wrapper_sends_on_beside_the_terminal_is_the_same_signal(handlers):
    done = []
    with pytest.raises(KeyboardInterrupt):
        block(done, signal.SIGINT, signal.SIGINT, signal.SIGTERM, apart_s=0.01)
    assert done == ["told", "went on", "went on", "went on"]


def test_it_goes_to_who_handled_it_before(handlers):
    taken = []
    signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    with Held():
        signal.raise_signal(signal.SIGTERM)
        assert taken == []
    assert taken == [signal.SIGTERM]


def test_of_one_that_nobody_handled_the_process_leaves_as_shells_have_it(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as left, Held():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143


def test_one_that_its_handler_takes_is_taken_once(handlers):
    taken = []
    signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    with Held() as waiting:
        signal.raise_signal(signal.SIGTERM)
        waiting.deliver()
        waiting.deliver()
        assert taken == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert taken == [signal.SIGTERM]
    assert taken == [signal.SIGTERM] * 2


def test_in_between_they_take_their_way_at_once(handlers):
    taken = []
    signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    with Held() as waiting:
        with waiting.released():
            signal.raise_signal(signal.SIGTERM)
            assert taken == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert taken == [signal.SIGTERM]


def test_an_ignored_one_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with Held(lambda: pytest.fail("told")):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_in_the_block_is_what_is_told(handlers):
    with pytest.raises(OSError, match="Invalid argument"):
        block([], signal.SIGINT, 9999)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_holds_nothing_and_runs():
    before, done = signal.getsignal(signal.SIGINT), []

    def work():
        with Held():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]
