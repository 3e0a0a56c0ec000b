from steps import calls_of

from fleetune.device_runtime.errors import TransportError
from fleetune.device_runtime.network.connection import send
from fleetune.device_runtime.network.loopback import Loopback


def test_topics_and_the_wildcard():
    server = Loopback()
    one, every = server.connect(["a/1/up"]), server.connect(["a/+/up"])
    for topic in ("a/1/up", "a/2/up", "a/1/down", "a/1/up/more"):
        server.connect([]).publish(topic, topic.encode())
    assert drain(one) == [("a/1/up", b"a/1/up")]
    assert drain(every) == [("a/1/up", b"a/1/up"), ("a/2/up", b"a/2/up")]


def test_the_last_retained_message_greets_a_newcomer():
    server = Loopback()
    for payload in (b"old", b"new"):
        server.connect([]).publish("status", payload, retain=True)
    assert drain(server.connect(["status"])) == [("status", b"new")]


def test_a_newcomer_with_a_wildcard_gets_each_retained_message_once():
    server = Loopback()
    for name in ("a", "b"):
        server.connect([]).publish(f"{name}/status", name.encode(), retain=True)
    late = server.connect(["+/status", "a/+"])
    assert sorted(drain(late)) == [("a/status", b"a"), ("b/status", b"b")]
    server.connect([]).publish("a/status", b"new", retain=True)
    assert drain(late) == [("a/status", b"new")], "two filters match, one message comes"


def test_who_left_gets_nothing_more():
    server = Loopback()
    links = [server.connect(["t"]) for _ in range(3)]
    links[0].close()
    links[1].kill()
    server.connect([]).publish("t", b"late")
    assert [drain(link) for link in links] == [[], [], [("t", b"late")]]


def test_a_message_costs_what_it_reaches_however_many_are_here():
    def cost(count):
        server = Loopback()
        for i in range(count):
            server.connect([f"job/{i}/down", "job/status"], will=(f"job/{i}/status", b"gone"))
        up, sender = server.connect(["job/+/up"]), server.connect(["job/5/down"])
        found = [
            calls_of(lambda topic=topic: sender.publish(topic, b"x")) for topic in ("job/7/down", "job/7/up")
        ]
        return [*found, calls_of(lambda: server.connect(["job/7/status"])), calls_of(up.close)]

    assert cost(2000) == cost(20)


def test_news_are_told_once_of_arrivals_messages_and_reconnections():
    server = Loopback()
    one, other = server.connect(["t"]), server.connect(["u"])
    assert server.take_news() == [one, other]
    other.publish("t", b"x")
    other.publish("t", b"y")
    assert (server.take_news(), server.take_news()) == ([one], [])
    server.restart()
    other.close()
    assert server.take_news() == [one]


def test_the_will_of_a_killed_link_is_sent_and_that_of_a_closed_one_is_not():
    server = Loopback()
    watcher = server.connect(["status"])
    server.connect([], will=("status", b"closed")).close()
    server.connect([], will=("status", b"killed")).kill()
    assert drain(watcher) == [("status", b"killed")]


def test_a_restart_loses_what_is_on_its_way_and_counts():
    server = Loopback()
    link = server.connect(["t"])
    server.connect([]).publish("t", b"lost")
    server.restart()
    assert (drain(link), link.connections) == ([], 2)


def test_disturb_decides_what_arrives():
    server = Loopback(disturb=lambda topic, payload: (payload, payload) if payload == b"twice" else ())
    link = server.connect(["t"])
    for payload in (b"twice", b"never"):
        server.connect([]).publish("t", payload)
    assert drain(link) == [("t", b"twice"), ("t", b"twice")]


def test_send_drops_while_disconnected_and_when_there_is_no_room(caplog):
    server = Loopback()
    listener, link = server.connect(["t"]), server.connect([])
    link.connected = False
    send(link, "t", b"lost")
    link.connected = True

    def full(topic, payload, *, retain):
        raise TransportError("64 messages wait")

    link.publish, publish = full, link.publish
    send(link, "t", b"lost too")
    assert "a message on t is lost: 64 messages wait" in caplog.text
    link.publish = publish
    send(link, "t", b"sent")
    assert drain(listener) == [("t", b"sent")]
    assert link.bytes_sent == len(b"sent")


def drain(link):
    return list(iter(lambda: link.receive(0), None))


def test_an_empty_retained_message_clears_the_topic():
    server = Loopback()
    for payload in (b"old", b""):
        server.connect([]).publish("status", payload, retain=True)
    assert drain(server.connect(["status"])) == []


def test_a_link_listens_to_a_topic_more_until_it_does_not_or_the_server_restarts():
    server = Loopback()
    link, other = server.connect(["own"]), server.connect([])
    for heard in (1, 0):
        link.listen("shared")
        other.publish("shared", b"1")
        link.unlisten("shared") if heard else server.restart()
        other.publish("shared", b"2")
        assert [link.receive(0) for _ in range(2)] == [("shared", b"1") if heard else None, None]
