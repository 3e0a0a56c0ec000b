from hypothesis import given
from hypothesis import strategies as st

from fleetune.device_runtime.network.topic_tree import TopicTree

levels = st.sampled_from(["a", "b", "", "+"])
topics = st.lists(levels, min_size=1, max_size=4).map("/".join)


def matches(one, other):
    pairs = list(zip(one.split("/"), other.split("/"), strict=False))
    return one.count("/") == other.count("/") and all(a == b or "+" in (a, b) for a, b in pairs)


@given(st.lists(st.tuples(topics, st.integers(0, 3)), max_size=12), st.sets(st.integers(0, 11)), topics)
def test_it_finds_what_a_look_at_everything_finds(held, let_go, asked):
    tree, left = TopicTree(), {}
    for topic, value in held:
        tree.add(topic, value)
        left[topic, value] = None
    for i in let_go & set(range(len(held))):
        tree.discard(*held[i])
        left.pop(held[i], None)
    assert sorted(tree.find(asked)) == sorted(value for topic, value in left if matches(topic, asked))
    for topic, value in left:
        tree.discard(topic, value)
    assert tree._root.below == {}, "nothing is left behind"


def test_letting_go_of_what_is_not_held_changes_nothing():
    tree = TopicTree()
    tree.add("a/b", 1)
    for topic, value in (("a/b", 2), ("a", 1), ("a/b/c", 1), ("a/+", 1)):
        tree.discard(topic, value)
    assert list(tree.find("a/b")) == [1]
