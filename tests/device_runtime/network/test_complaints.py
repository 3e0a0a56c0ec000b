import logging

from fleetune.device_runtime.network.complaints import LINES_MAX, SENDERS_MAX, Complaints


def test_one_sender_has_some_lines_a_minute_and_then_a_number(caplog):
    complaints = Complaints()
    told = [complaints.may_tell("pi", 100.0 + i / 100) for i in range(5000)]
    assert sum(told) == LINES_MAX
    assert told[:LINES_MAX] == [True] * LINES_MAX
    with caplog.at_level(logging.WARNING):
        assert complaints.may_tell("pi", 161.0)
    assert [r.getMessage() for r in caplog.records] == ["pi: 4995 more messages that deserved a line"]


def test_no_sender_takes_anothers_lines_and_no_number_of_senders_the_memory():
    complaints = Complaints()
    assert sum(complaints.may_tell("loud", 1.0) for _ in range(100)) == LINES_MAX
    assert complaints.may_tell("quiet", 1.0)
    told = sum(complaints.may_tell(f"device-{i}", 2.0) for i in range(10_000))
    assert SENDERS_MAX <= told <= SENDERS_MAX + LINES_MAX
    assert len(complaints._counts) <= SENDERS_MAX + 1
