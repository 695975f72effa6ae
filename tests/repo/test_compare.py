import dataclasses
import json

import pytest

from kvist.errors import NotFound
from kvist.repo import LogicalSeq, Manifest, Repository
from kvist.repo.compare import diff

from .making import LAYOUT, halves, manifest, snapshot

HALF = LAYOUT.page_bytes


def test_diff_counts_halves_and_tokens(repo: Repository) -> None:
    shared, left, right = halves(2), halves(1, 1), halves(2, 2)
    repo.put_pages([*shared, *left, *right])
    a = repo.commit([manifest(shared + left, seqs=[LogicalSeq("s", (0, 1, 2), 1, tuple(range(9)))])], branch="a")
    b = repo.commit(
        [
            manifest(
                shared + right, seqs=[LogicalSeq("s", (0, 1), 0, (0, 1, 2, 9, 9, 9, 9, 9)), LogicalSeq("t", (2, 3))]
            )
        ],
        branch="b",
    )
    found = diff(repo, "a", "b")
    assert (found.a, found.b, found.same_layout) == (a.cid, b.cid, True)
    assert (found.pages_shared, found.pages_only_a, found.pages_only_b) == (4, 2, 4)
    assert (found.bytes_shared, found.bytes_only_a, found.bytes_only_b) == (4 * HALF, 2 * HALF, 4 * HALF)
    assert [(s.id, s.tokens_a, s.tokens_b, s.tokens_shared) for s in found.sequences] == [
        ("s", 9, 8, 3),
        ("t", 0, 8, 0),
    ]
    assert found.tokens_shared == 3
    assert json.loads(json.dumps(found.to_json()))["tokens_shared"] == 3
    back = diff(repo, "b", "a")
    assert (back.pages_only_a, back.bytes_only_b) == (found.pages_only_b, found.bytes_only_a)


def test_diff_with_itself_and_with_nothing(repo: Repository) -> None:
    snapshot(repo, halves(2), "a")
    repo.commit([Manifest(LAYOUT)], branch="empty")
    same = diff(repo, "a", "a")
    assert (same.pages_shared, same.pages_only_a, same.pages_only_b) == (4, 0, 0)
    assert diff(repo, "a", "empty").pages_only_a == 4
    with pytest.raises(NotFound):
        diff(repo, "a", "nothing")


def test_each_side_counts_by_its_own_page_size(repo: Repository) -> None:
    other = dataclasses.replace(LAYOUT, page_size_tokens=8)
    snapshot(repo, halves(1), "a")
    data = halves(1, 1, other)
    repo.put_pages(data)
    repo.commit([manifest(data, other)], branch="b")
    found = diff(repo, "a", "b")
    assert not found.same_layout
    assert [(s.tokens_a, s.tokens_b) for s in found.sequences] == [(4, 8)]
