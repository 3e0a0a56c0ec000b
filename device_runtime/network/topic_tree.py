"""Values under MQTT topics and topic filters (exact levels and ``+``): found in the time of a walk, however many there are."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

T = TypeVar("T", bound=Hashable)


class _Node(Generic[T]):
    __slots__ = ("below", "values")

    def __init__(self) -> None:
        self.below: dict[str, _Node[T]] = {}
        self.values: dict[T, None] = {}  # a set that keeps its order


class TopicTree(Generic[T]):
    """A trie by topic level; ``+`` matches any one level, be it in what is held or in what is asked for."""

    def __init__(self) -> None:
        self._root: _Node[T] = _Node()

    def add(self, topic: str, value: T) -> None:
        """Hold a value under a topic or filter; once, however often it is added."""
        node = self._root
        for level in topic.split("/"):
            node = node.below.setdefault(level, _Node())
        node.values[value] = None

    def discard(self, topic: str, value: T) -> None:
        """Let go of a value, if it is held under exactly this topic or filter; what holds nothing is freed."""
        path, node = [], self._root
        for level in topic.split("/"):
            if level not in node.below:
                return
            path.append((node, level))
            node = node.below[level]
        node.values.pop(value, None)
        for parent, level in reversed(path):
            child = parent.below[level]
            if child.values or child.below:
                return
            del parent.below[level]

    def find(self, topic: str) -> Iterator[T]:
        """Yield the values under everything that matches; one held under several filters comes as often."""
        nodes = [self._root]
        for level in topic.split("/"):
            nodes = [child for node in nodes for child in _next(node, level)]
        for node in nodes:
            yield from node.values


def _next(node: _Node[T], level: str) -> list[_Node[T]]:
    if level == "+":
        return list(node.below.values())
    return [node.below[name] for name in (level, "+") if name in node.below]
