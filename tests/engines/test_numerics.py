"""Sequences from an engine of other numerics, a converted snapshot's among them: their pages stay apart."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest

from kvist.engines.hf import Engine, HfPager
from kvist.errors import InvalidInput
from kvist.pager import LogicalSeq, capture, restore
from kvist.pager.carry import NUMERICS
from kvist.repo import Manifest, PageEntry, Repository, Snapshot
from kvist.store import MemoryStore

from .driving import params, prompt, run

Load = Callable[..., Engine]


@pytest.fixture
def repo() -> Iterator[Repository]:
    with Repository.init(MemoryStore()) as repo:
        yield repo


def captured(engine: Engine, repo: Repository, name: str, **how: Any) -> Snapshot:
    return capture(HfPager(engine, [name]), repo, **how).snapshot


def foreign(repo: Repository, cid: str) -> Snapshot:
    """The same tokens as another engine might have computed them: the halves of one page are in each other's place."""
    (manifest,) = repo.manifests(cid)
    first, *rest = manifest.pages
    pages: list[PageEntry] = [replace(first, k=first.v, v=first.k), *rest]
    return repo.commit([Manifest(manifest.layout, tuple(pages), manifest.sequences, {"engine": "another"})])


def halves(repo: Repository, cid: str) -> list[tuple[str, str]]:
    (manifest,) = repo.manifests(cid)
    entries = {page.ix: (page.k, page.v) for page in manifest.pages}
    return [entries[ix] for ix in manifest.sequences[0].page_ixs]


def test_they_are_given_to_no_other_sequence(load: Load, repo: Repository) -> None:
    """Neither to a prompt, nor to a snapshot that was the engine's own; and what was captured is what was held."""
    source, target = load(), load()
    run(source, prompt(40), 5, sequence_id="story")
    expected = run(source, [], 6, resume="story")
    own = captured(source, repo, "story", branch="main")
    other = foreign(repo, own.cid)

    assert not restore(HfPager(target), repo, other.cid, rename="other-{}".format).same_numerics
    request = target.submit(prompt(40), params(1))
    request.result()
    assert request.cached_tokens == 0
    done = restore(HfPager(target), repo, own.cid)
    assert done.same_numerics
    assert run(target, [], 6, resume="story") == expected
    again = captured(target, repo, "other-story", parents=[own.cid])
    assert halves(repo, again.cid) == halves(repo, other.cid)


def test_what_goes_on_from_them_stays_apart_and_is_bit_exact(load: Load, repo: Repository) -> None:
    """Through a snapshot of the engine's own numerics, into another engine."""
    source, first, second = load(), load(), load()
    run(source, prompt(40), 5, sequence_id="story")
    own = captured(source, repo, "story", branch="main")
    restore(HfPager(first), repo, foreign(repo, own.cid).cid, rename=lambda _: "other")
    run(first, [], 20, resume="other", sequence_id="on")
    expected = run(first, [], 6, resume="on")
    on = captured(first, repo, "on", parents=[own.cid])
    (manifest,) = repo.manifests(on.cid)
    assert manifest.numerics == first.numerics()
    assert manifest.sequences[0].state[NUMERICS].startswith("sha256:")

    assert restore(HfPager(second), repo, own.cid).pages_loaded == len(halves(repo, own.cid))
    done = restore(HfPager(second), repo, on.cid)
    assert done.same_numerics and done.pages_loaded == done.pages
    assert run(second, [], 6, resume="on") == expected


def test_a_state_that_cannot_be_read(load: Load) -> None:
    pager = HfPager(load())
    with pytest.raises(InvalidInput, match="numerics to be a digest, got 7"):
        pager.install_logical_seqs([LogicalSeq("s", (), token_ids=(1,), state={NUMERICS: 7})])
