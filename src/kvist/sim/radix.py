"""A radix cache as SGLang keeps it, for simulation: a tree of contents, of which leaves that nobody uses are evicted.

It knows contents by interned numbers (see `kvist.sim.chains`): two chains that hold the same number at one place are
equal up to there, so where a chain leaves an edge is found by bisection. Pages are counted, not numbered, because a
page lies either under one node of the tree or with one request. Rules: SGLang's ``radix_cache.py`` as Dynamo 1.6.1's
mocker has them; among them, that only nodes matched whole are touched, and that the last leaf extends in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np

from kvist.sim.pool import Move


@dataclass(slots=True, eq=False)
class Node:
    """An edge of the tree with what lies at its end.

    Attributes:
        parent: None: the root, or a node that was evicted.
        contents: of the edge's pages, in order.
        touched: when it was last used, on the caller's clock.
        locks: requests that use it or a node below it.
        children: by their first content.
    """

    parent: Node | None
    contents: list[int]
    touched: int
    locks: int = 0
    children: dict[int, Node] = field(default_factory=dict)

    @property
    def is_idle_leaf(self) -> bool:
        """Whether it may be evicted."""
        return not self.locks and not self.children and self.parent is not None


class RadixCache:
    """Pages of one device: free, under a node of the tree, or with a request that has not given them to the tree.

    Args:
        num_slots: pages, 1 or more.
        tell: whether to note what is stored and removed.
    """

    def __init__(self, num_slots: int, *, tell: bool = False) -> None:
        self.num_slots = num_slots
        self.num_blank = num_slots  # pages that hold nothing
        self.num_evictable = 0  # under nodes that nobody uses
        self.num_evicted = 0
        self.moves: list[Move] = []  # in order; whoever reads it clears it
        self.root = Node(None, [], 0)
        self._tell = tell
        self._leaves: list[tuple[int, int, Node]] = []  # idle leaves by `touched`; entries that are out of date stay
        self._offers = 0

    @property
    def num_free(self) -> int:
        """Pages that can be had."""
        return self.num_blank + self.num_evictable

    @property
    def num_used(self) -> int:
        """Pages that requests hold or share."""
        return self.num_slots - self.num_free

    def match(self, chain: Sequence[int], limit: int) -> int:
        """How many of the first ``limit`` contents are here; nothing is touched."""
        node, at = self.root, 0
        while at < limit and (child := node.children.get(chain[at])) is not None:
            common = _common(child.contents, chain, at, limit)
            at += common
            if common < len(child.contents):
                break
            node = child
        return at

    def lock(self, chain: Sequence[int], limit: int, now: int) -> tuple[int, Node]:
        """Hold the longest prefix of at most ``limit`` contents; returns its length, and the node where it ends."""
        node, at = self.root, 0
        while at < limit and (child := node.children.get(chain[at])) is not None:
            common = _common(child.contents, chain, at, limit)
            at += common
            if common < len(child.contents):
                node = self._split(child, common)
                break
            child.touched = now
            node = child
        self.hold(node)
        return at, node

    def hold(self, node: Node) -> None:
        """One more request uses a node and those above it."""
        while node.parent is not None:
            if not node.locks:
                self.num_evictable -= len(node.contents)
            node.locks += 1
            node = node.parent

    def drop(self, node: Node) -> None:
        """One request fewer does."""
        while node.parent is not None:
            node.locks -= 1
            if not node.locks:
                self.num_evictable += len(node.contents)
                self._offer(node)
            node = node.parent

    def insert(self, start: Node, contents: list[int], now: int) -> Node:
        """Hang contents below a node that a request holds; returns the node where they end.

        The tree owns the request's pages from then on; pages of contents that were here already are blank again.
        """
        above: Node | None = start
        while above is not None:
            above.touched = now
            above = above.parent
        node, at = start, 0
        while at < len(contents):
            if not node.children and node is not self.root and node.locks == (node is start):
                self._extend(node, contents[at:], now)
                break
            child = node.children.get(contents[at])
            if child is None:
                node.children[contents[at]] = child = Node(node, [], now)
                self._extend(child, contents[at:], now)
                node = child
                break
            common = _common(child.contents, contents, at, len(contents))
            at += common
            if common == len(child.contents):
                node = child
                node.touched = now
            else:
                node = self._split(child, common)
        self._offer(node)
        self.num_blank += at
        return node

    def take(self, pages: int) -> bool:
        """Make so many pages a request's own; leaves that nobody uses give way, oldest first.

        Where too few can be had, all that may be evicted is, and nothing is taken; returns whether they could.
        """
        has_room = pages <= self.num_free
        while self.num_blank < (pages if has_room else self.num_free):
            touched, _, node = heappop(self._leaves)
            if node.is_idle_leaf and node.touched == touched:
                self._evict(node, min(pages - self.num_blank, len(node.contents)))
        self.num_blank -= pages if has_room else 0
        return has_room

    def give(self, pages: int) -> None:
        """Take back pages that a request had for itself."""
        self.num_blank += pages

    def _evict(self, leaf: Node, pages: int) -> None:
        """Forget the last pages of an idle leaf."""
        if self._tell:
            self.moves.append((False, np.array(leaf.contents[-pages:], dtype=np.int64), 0))
        self.num_blank += pages
        self.num_evictable -= pages
        self.num_evicted += pages
        first = leaf.contents[0]
        del leaf.contents[-pages:]
        if leaf.contents:
            self._offer(leaf)
            return
        parent, leaf.parent = leaf.parent, None
        assert parent is not None, "the root is no idle leaf"
        del parent.children[first]
        self._offer(parent)

    def _extend(self, node: Node, contents: list[int], now: int) -> None:
        node.contents.extend(contents)
        node.touched = now
        if not node.locks:
            self.num_evictable += len(contents)
        if self._tell:
            self.moves.append((True, np.array(contents, dtype=np.int64), 0))

    def _split(self, node: Node, at: int) -> Node:
        """Cut an edge in two; returns the upper part, which inherits the time of its last use."""
        parent = node.parent
        assert parent is not None, "the root has no edge"
        upper = Node(parent, node.contents[:at], node.touched, node.locks)
        node.contents = node.contents[at:]
        node.parent = upper
        upper.children[node.contents[0]] = node
        parent.children[upper.contents[0]] = upper
        return upper

    def _offer(self, node: Node) -> None:
        if node.is_idle_leaf:
            self._offers += 1
            heappush(self._leaves, (node.touched, self._offers, node))


def _common(edge: list[int], chain: Sequence[int], at: int, limit: int) -> int:
    """How far an edge and a chain from ``at`` on are equal; their first contents are."""
    low, high = 1, min(len(edge), limit - at)
    if edge[high - 1] == chain[at + high - 1]:
        return high
    while low + 1 < high:  # equal up to low, not up to high
        middle = (low + high) // 2
        low, high = (middle, high) if edge[middle - 1] == chain[at + middle - 1] else (low, middle)
    return low
