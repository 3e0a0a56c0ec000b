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
