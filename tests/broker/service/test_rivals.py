import pytest

from fleetune.broker.service.rivals import ANSWER_S, has_rival, knock_of
from fleetune.device_runtime.contracts.wire import AggregatorStatus, aggregator_topic, decode, encode

TOPIC = aggregator_topic("job")


class Scripted:
    """A connection that brings what it is told to, a second apart, and the knock at its place."""

    def __init__(self, *arriving):
        self.arriving, self.now, self.said = list(arriving), 0.0, []

    def publish(self, topic, payload, *, retain=False):
        self.said.append((topic, decode(payload), retain))

    def receive(self, timeout_s):
        found = self.arriving.pop(0) if self.arriving else None
        self.now += 1.0 if found else timeout_s
        return None if found is None else (TOPIC, found)


def status(*, online=True, session="other"):
    return encode(AggregatorStatus(job="job", session=session, online=online, round=1, version=1))


KNOCK = encode(knock_of("job"))


@pytest.mark.parametrize(
    ("arriving", "rival", "took_s"),
    [
        ((KNOCK,), False, 1.0),
        ((status(online=False), KNOCK), False, 2.0),
        ((status(), KNOCK, status()), True, 3.0),
        ((KNOCK, status()), False, 1.0),
        ((status(), KNOCK), False, ANSWER_S),
        ((status(), KNOCK, status(online=False)), False, 3.0),
        ((b"garbage", KNOCK), False, 2.0),
        ((), None, ANSWER_S),
        ((status(),), None, ANSWER_S),
    ],
    ids=[
        "nobody",
        "offline",
        "answers",
        "no claim",
        "dead",
        "leaves",
        "garbage",
        "no echo",
        "no echo beside a claim",
    ],
)
def test_only_an_answer_counts(arriving, rival, took_s):
    link = Scripted(*arriving)
    assert has_rival(link, "job", clock=lambda: link.now) is rival
    assert link.now == took_s
    assert link.said == [(TOPIC, knock_of("job"), False)], "what is retained stays as it is"
