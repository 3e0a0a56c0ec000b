import signal
import threading

import pytest

from fleetune.device_runtime.training.signals import held


@pytest.fixture
def handlers():
    """Puts back what the tests set."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def block(done, *numbers):
    with held(lambda: done.append("told")):
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


def test_it_goes_to_who_handled_it_before(handlers):
    taken = []
    signal.signal(signal.SIGTERM, lambda number, frame: taken.append(number))
    with held():
        signal.raise_signal(signal.SIGTERM)
        assert taken == []
    assert taken == [signal.SIGTERM]


def test_of_one_that_nobody_handled_the_process_leaves_as_shells_have_it(handlers):
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with pytest.raises(SystemExit) as left, held():
        signal.raise_signal(signal.SIGTERM)
    assert left.value.code == 143


def test_an_ignored_one_stays_ignored(handlers):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with held(lambda: pytest.fail("told")):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_an_error_in_the_block_is_what_is_told(handlers):
    with pytest.raises(OSError, match="Invalid argument"):
        block([], signal.SIGINT, 9999)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_another_thread_holds_nothing_and_runs():
    before, done = signal.getsignal(signal.SIGINT), []

    def work():
        with held():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [before]
