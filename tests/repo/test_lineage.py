import itertools
import random

import pytest

from kvist.repo import Snapshot
from kvist.repo.lineage import ancestors, lanes, newest_first

M = "sha256:" + "f" * 64


def graph(*edges: tuple[str, str]) -> dict[str, list[str]]:
    """``("ab", "c")``: a and b have the parent c."""
    nodes: dict[str, list[str]] = {}
    for children, parents in edges:
        for parent in parents:
            nodes.setdefault(parent, [])
        for child in children:
            nodes.setdefault(child, []).extend(parents)
    return nodes


def test_ancestors_come_once() -> None:
    diamond = graph(("d", "bc"), ("bc", "a"))
    asked: list[str] = []

    def parents(cid: str) -> list[str]:
        asked.append(cid)
        return diamond[cid]

    assert sorted(ancestors(["d", "b", "d"], parents)) == list("abcd")
    assert sorted(asked) == list("abcd")
    assert list(ancestors([], parents)) == []
    with pytest.raises(KeyError):
        list(ancestors(["x"], parents))


def test_a_long_line_needs_no_recursion() -> None:
    assert len(list(ancestors(["50000"], lambda cid: [str(int(cid) - 1)] if cid != "0" else []))) == 50001


def chain(times: list[int]) -> dict[str, Snapshot]:
    made: dict[str, Snapshot] = {}
    last: tuple[str, ...] = ()
    for time in times:
        snapshot = Snapshot((M,), last, created_ns=time)
        made[snapshot.cid] = snapshot
        last = (snapshot.cid,)
    return made


def test_children_come_before_parents_whatever_the_clocks_say() -> None:
    for times in ([1, 2, 3], [3, 2, 1], [2, 2, 2], [5, 1, 9]):
        snapshots = chain(times)
        assert newest_first(snapshots) == list(snapshots)[::-1]


def test_newest_first_among_the_free() -> None:
    root = Snapshot((M,), created_ns=1)
    heads = [Snapshot((M,), (root.cid,), created_ns=time) for time in (5, 9, 7)]
    order = newest_first({each.cid: each for each in [root, *heads]})
    assert order == [heads[1].cid, heads[2].cid, heads[0].cid, root.cid]
    assert newest_first({heads[0].cid: heads[0]}) == [heads[0].cid], "parents that are left out are ignored"
    assert newest_first({}) == []


def test_random_graphs_are_ordered_and_deterministic() -> None:
    chance = random.Random(3)
    for _ in range(50):
        made: dict[str, Snapshot] = {}
        for _ in range(15):
            parents = tuple(chance.sample(sorted(made), min(len(made), chance.randint(0, 2))))
            each = Snapshot((M,), parents, created_ns=chance.randint(0, 5), nonce=str(len(made)))
            made[each.cid] = each
        order = newest_first(made)
        places = {cid: i for i, cid in enumerate(order)}
        assert places.keys() == made.keys()
        assert all(places[cid] < places[p] for cid in made for p in made[cid].parents)
        shuffled = dict(chance.sample(sorted(made.items()), len(made)))
        assert newest_first(shuffled) == order
        rows = list(lanes(order, {cid: each.parents for cid, each in made.items()}.__getitem__))
        for row, below in itertools.pairwise(rows):
            assert below.before == row.after
        assert rows[-1].after == ()
        for row in rows:
            assert row.cid not in row.after
            waiting = [cid for cid in row.after if cid is not None]
            assert len(waiting) == len(set(waiting)), "one lane a snapshot"
            assert set(made[row.cid].parents) <= set(waiting)


def test_lanes_of_a_merge() -> None:
    nodes = graph(("m", "ab"), ("a", "r"), ("b", "r"))
    rows = list(lanes("mabr", lambda cid: nodes[cid]))
    assert [(row.cid, row.lane, row.before, row.after) for row in rows] == [
        ("m", 0, (), ("a", "b")),
        ("a", 0, ("a", "b"), ("r", "b")),
        ("b", 1, ("r", "b"), ("r",)),
        ("r", 0, ("r",), ()),
    ]
