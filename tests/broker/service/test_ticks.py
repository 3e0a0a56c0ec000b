"""When a service that takes messages looks whether anything else is due."""

from fleetune.broker.service.ticks import LOOK_S, Ticks


class Service:
    """Is due at a time, and says when it was asked and ticked."""

    def __init__(self, due):
        self.due, self.asked, self.ticked = due, [], []

    def due_at(self, now):
        self.asked.append(now)
        return max(self.due, now)

    def tick(self, now):
        self.ticked.append(now)


def test_what_is_due_is_done_at_once_where_nothing_waits():
    service = Service(due=3.0)
    ticks = Ticks(service)
    for now in (1.0, 2.0, 3.0, 3.001):
        ticks.turn(now, has_more=False)
    assert (service.asked, service.ticked) == ([1.0, 2.0, 3.0, 3.001], [3.0, 3.001])


def test_while_messages_wait_it_is_looked_now_and_then_and_nothing_is_put_off_for_ever():
    service = Service(due=0.0)
    ticks = Ticks(service)
    for step in range(100):
        ticks.turn(1.0 + step * LOOK_S / 10, has_more=True)
    assert 9 <= len(service.ticked) <= 10
    ticks.turn(1.0 + 99.1 * LOOK_S / 10, has_more=False)
    assert service.ticked[-1] == 1.0 + 99.1 * LOOK_S / 10, "nothing waits: it is looked"
