"""Snapshots of several manifests: one for each group of each tensor-parallel rank."""

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.errors import InvalidInput, InvalidManifest, MissingPage
from kvist.repo import LogicalSeq, Manifest, PageEntry, Repository, fsck, gc
from kvist.repo.compare import PartDiff, SequenceDiff, diff
from kvist.repo.objects import manifest_key
from kvist.repo.snapshot import check_parts
from kvist.repo.stats import count

from .making import LAYOUT, commit_parts, digest, halves, manifest, parts, read_back, snapshot

SMALL, LARGE = LAYOUT.page_bytes, LAYOUT.page_bytes * 3 // 2
"""Bytes of a half of the first and of the second group."""


def test_it_reads_back_in_order_and_counts_the_tokens_of_the_fullest(repo: Repository) -> None:
    made, manifests = commit_parts(repo)
    assert made.manifests == tuple(each.cid for each in manifests)
    assert [each.tokens for each in manifests] == [12, 8, 12, 8] and made.tokens == 12
    assert read_back(repo, "main") == [half for n, each in enumerate(parts()) for half in halves(3 - n % 2, n, each)]
    assert [repo.manifest(cid) for cid in made.manifests] == manifests
    (fork,) = repo.fork("main", 1)
    assert fork.manifests == made.manifests and fork.tokens == 12


ORDERS = st.permutations(range(4)).flatmap(lambda order: st.integers(0, 4).map(lambda n: order[:n]))


@given(ORDERS)
def test_some_of_the_parts_will_do_but_only_in_order(order: list[int]) -> None:
    manifests = [Manifest(parts()[n]) for n in order]
    if order == sorted(order):
        check_parts(manifests)
    else:
        with pytest.raises(InvalidInput, match="ascend by rank, then by group"):
            check_parts(manifests)


def test_refuses_two_of_one_rank_and_group_and_parts_of_different_wholes(repo: Repository) -> None:
    one, two = Manifest(LAYOUT), Manifest(dataclasses.replace(LAYOUT, model="other"))
    refused = {
        "each pair once": [one, two],
        r"tp_size, got \[2, 3\]": [Manifest(parts(2)[0]), Manifest(parts(3)[1])],
        r"n_groups, got \[2, 3\]": [Manifest(parts(2, 2)[0]), Manifest(parts(2, 3)[1])],
    }
    for why, manifests in refused.items():
        with pytest.raises(InvalidInput, match=why):
            repo.commit(manifests, branch="main")
    assert [info.key for info in repo.store.list()] == ["kvist.json"]


def test_a_page_that_two_groups_name_by_different_sizes_is_refused_whichever_is_first(repo: Repository) -> None:
    first, second = parts(1)
    for layout in (first, second):
        (half, _) = halves(1, 0, layout)
        repo.put_pages([half])
        entry = PageEntry(0, digest(half), digest(half))
        with pytest.raises(InvalidManifest, match=f"has {layout.page_bytes} bytes"):
            repo.commit([Manifest(first, (entry,)), Manifest(second, (entry,))], branch="main")


def test_a_missing_page_of_any_part_is_refused(repo: Repository) -> None:
    first, second = parts(1)
    repo.put_pages(halves(1, 0, first))
    with pytest.raises(MissingPage):
        repo.commit([manifest(halves(1, 0, first), first), manifest(halves(1, 1, second), second)], branch="main")


def test_fsck_and_gc_see_every_part(repo: Repository) -> None:
    commit_parts(repo, "a")
    gone, _ = commit_parts(repo, None, seed=1)
    assert fsck.check(repo).pages == 2 * (3 + 2 + 3 + 2)
    done = gc.apply(repo, gc.plan(repo, min_age=0))
    assert set(done.manifests) == set(gone.manifests) and len(done.manifests) == 4
    assert fsck.check(repo).is_clean and len(read_back(repo, "a")) == 20
    last = repo.snapshot("a").manifests[-1]
    repo.store.delete([manifest_key(last)])
    assert [(f.code, f.subject) for f in fsck.check(repo).findings] == [(fsck.Code.MISSING_MANIFEST, last)]


def test_diff_tells_the_parts_apart(repo: Repository) -> None:
    commit_parts(repo, "a")
    commit_parts(repo, "b", pages=4)
    found = diff(repo, "a", "b")
    assert found.same_layout
    assert found.parts == tuple(PartDiff(rank, group, 6 - 2 * group, 0, 2) for rank in range(2) for group in range(2))
    assert (found.pages_shared, found.pages_only_a, found.pages_only_b) == (20, 0, 8)
    assert found.bytes_shared == 2 * 6 * SMALL + 2 * 4 * LARGE
    assert found.bytes_only_b == 2 * 2 * SMALL + 2 * 2 * LARGE
    assert found.sequences == (SequenceDiff("s", 13, 17, 13),)
    snapshot(repo, halves(2, 0, LAYOUT), "whole")
    other = diff(repo, "whole", "a")
    assert not other.same_layout
    assert [(part.tp_rank, part.group, part.pages_only_b) for part in other.parts] == [
        (0, 0, 2), (0, 1, 4), (1, 0, 6), (1, 1, 4),
    ]  # fmt: skip
    assert json.loads(json.dumps(other.to_json()))["parts"][3]["group"] == 1


def test_diff_counts_a_sequence_without_token_ids_by_its_longest_part(repo: Repository) -> None:
    first, second = parts(1)
    manifests = []
    for layout, seq in ((first, LogicalSeq("s", (0,))), (second, LogicalSeq("s", (0,), 2, first_page=5))):
        data = halves(1, 0, layout)
        repo.put_pages(data)
        manifests.append(manifest(data, layout, seqs=[seq, LogicalSeq("only", ())][: 1 + layout.group]))
    repo.commit(manifests, branch="a")
    assert [(s.id, s.tokens_a) for s in diff(repo, "a", "a").sequences] == [("only", 0), ("s", 22)]


def test_stats_count_the_pages_of_every_part(repo: Repository) -> None:
    made, _ = commit_parts(repo)
    commit_parts(repo)
    found = count(repo)
    assert found.page_bytes == 2 * 6 * SMALL + 2 * 4 * LARGE == found.logical_bytes // 2
    assert (found.snapshots, found.manifests, found.tokens) == (2, 4, 24)
    assert repo.snapshot("main").parents == (made.cid,)
