"""Snapshots of sequences that use a cartridge: out of one engine, into another, with the cartridge there or not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvist.cartridge.placing import VIRTUAL
from kvist.cartridge.snapshots import from_repository
from kvist.engines.hf import Engine, HfPager
from kvist.errors import InvalidInput, UnknownCartridge
from kvist.pager import LogicalSeq
from kvist.pager.capture import capture
from kvist.pager.restore import restore
from kvist.repo import Repository

from .cartridges import captured, document, noise
from .driving import carry, page_bytes, params, prompt, run, trace

Load = Callable[..., Engine]
QUESTION = prompt(9, seed=5)


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repository]:
    with Repository.open(str(tmp_path / "store"), create=True) as repo:
        yield repo


def snapshot(engine: Engine, repo: Repository, *names: str) -> str:
    return capture(HfPager(engine), repo, sequences=names or None, branch="main").snapshot.cid


def test_a_cartridge_from_an_engines_snapshot_is_exact(load: Load, repo: Repository, tmp_path: Path) -> None:
    """Prefill, capture, `from_repository`, load: logits of cartridge and question are those of the whole prompt."""
    engine, ids = load(), document(53, 0)
    run(engine, ids, 0, sequence_id="doc")
    cid = snapshot(engine, repo, "doc")
    cartridge = from_repository(repo, cid, model=engine.model.identity, directory=tmp_path / "doc", cartridge_id="doc")
    assert cartridge.token_ids == tuple(ids)
    fresh = load()
    fresh.load_cartridge(cartridge)
    assert run(fresh, QUESTION, 20, cartridge="doc") == run(load(), ids + QUESTION, 20)


@pytest.mark.parametrize("known", ["same", "none"])
@pytest.mark.parametrize("length", [5, 16, 40])
@pytest.mark.parametrize("with_ids", [True, False])
def test_a_session_goes_on_elsewhere(with_ids: bool, length: int, known: str, load: Load, repo: Repository) -> None:
    engine = load()
    made = captured(engine, document(length, 0), "c") if with_ids else noise(engine, length, seed=1, name="c")
    engine.load_cartridge(made)
    whole = run(engine, QUESTION, 30, cartridge="c")
    first = run(engine, QUESTION, 11, cartridge="c", sequence_id="part")
    cid = snapshot(engine, repo, "part")
    (seq,) = repo.manifest(repo.snapshot(cid).manifests[0]).sequences
    assert seq.state["cartridge"] == {"id": "c", "identity": made.identity, "tokens": length, "placed": True}
    assert (VIRTUAL in seq.token_ids) == (not with_ids)
    assert seq.token_ids[length:] == tuple(QUESTION + first.tokens)
    target = load()
    if known == "same":
        target.load_cartridge(made)
        run(target, QUESTION, 3, cartridge="c", sequence_id="own")
    restore(HfPager(target), repo, cid)
    request = target.submit([], params(19), resume="part")
    assert first + trace(request.result()) == whole
    assert (request.prompt_tokens, request.cached_tokens) == (len(QUESTION) + 11, len(QUESTION) + 10)
    if known == "same":
        assert page_bytes(target, "part")[: length // 16] == page_bytes(target, "own")[: length // 16]
        shared = target.stats()["pages_held"]
        assert shared < 3 * -(-(length + 40) // 16), "full pages of the cartridge are shared with what was there"
    again = snapshot(target, repo, "part")
    assert repo.manifest(repo.snapshot(again).manifests[0]).sequence("part") == replace(
        seq, page_ixs=repo.manifest(repo.snapshot(again).manifests[0]).sequences[0].page_ixs
    )


def test_a_restored_session_survives_preemption_without_its_cartridge(load: Load, repo: Repository) -> None:
    """Its pages came with the snapshot: they are kept in host memory while it runs, and taken up again from there."""
    engine = load()
    engine.load_cartridge(noise(engine, 40, seed=1, name="c"))
    run(engine, QUESTION, 3, cartridge="c", sequence_id="part")
    expected = [run(engine, prompt(4, seed=n), 80, resume="part") for n in range(4)]
    cid = snapshot(engine, repo, "part")
    target = load(pages=14)
    restore(HfPager(target), repo, cid)
    target.pause()
    requests = [target.submit(prompt(4, seed=n), params(80), resume="part") for n in range(4)]
    target.resume()
    assert [trace(request.result()) for request in requests] == expected
    assert target.stats()["preemptions"] > 0
    assert target.cartridges.ids() == []


def test_one_that_has_given_up_its_pages_needs_the_cartridge(load: Load) -> None:
    """It is captured with its ids and without pages; only the cartridge itself brings those of virtual ids back."""
    engine = load()
    engine.load_cartridge(noise(engine, 40, seed=1, name="c"))
    whole = run(engine, QUESTION, 20, cartridge="c")
    run(engine, QUESTION, 5, cartridge="c", sequence_id="part")
    (seq,) = HfPager(engine, ["part"]).logical_seqs()
    target = load()
    HfPager(target).install_logical_seqs([replace(seq, page_ixs=(), fill_in_last_page=0)])
    with pytest.raises(UnknownCartridge, match="identity"):
        target.submit([], params(15), resume="part")
    target.load_cartridge(noise(target, 40, seed=1, name="another-name"))
    rest = run(target, [], 15, resume="part")
    assert whole.tokens[5:] == rest.tokens
    assert whole.logits.endswith(rest.logits)


def test_a_whole_engine_with_its_prefix_cache_moves(load: Load, repo: Repository) -> None:
    """Pages of cartridges come back under their salted hashes, and nobody else finds them."""
    engine, ids = load(), document(40, 0)
    engine.load_cartridge(captured(engine, ids, "a"))
    engine.load_cartridge(noise(engine, 40, seed=1, name="b"))
    expected = {name: run(engine, QUESTION, cartridge=name) for name in ("a", "b")}
    expected_none = run(load(), ids + QUESTION)
    cid = snapshot(engine, repo)
    target = load()
    restore(HfPager(target), repo, cid)
    none = target.submit(ids + QUESTION, params(8))
    assert trace(none.result()) == expected_none
    assert none.cached_tokens == 0
    target.load_cartridge(noise(target, 40, seed=1, name="b"))
    request = target.submit(QUESTION + expected["b"].tokens, params(1), cartridge="b")
    assert request.result()
    assert request.cached_tokens == len(QUESTION) + 7


def test_forks_of_a_session_share_its_cartridge(load: Load) -> None:
    engine = load()
    engine.load_cartridge(noise(engine, 40, seed=1, name="c"))
    run(engine, QUESTION, 3, cartridge="c", sequence_id="trunk")
    before = page_bytes(engine, "trunk")
    requests = [engine.submit([], params(2), resume="trunk", sequence_id=f"fork-{n}") for n in range(6)]
    traces = [trace(request.result()) for request in requests]
    assert all(one == traces[0] for one in traces)
    assert page_bytes(engine, "trunk") == before
    assert {info.cartridge for info in engine.sequences()} == {"c"}
    assert engine.cartridges.metrics().in_use == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 41}, "token ids that are not in"),
        ({"tokens": 39}, "token ids that are not in"),
        ({"tokens": 1000}, "begins with a cartridge of 1000 tokens"),
        ({"tokens": 0}, "state's cartridge"),
        ({"tokens": True}, "state's cartridge"),
        ({"identity": None}, "state's cartridge"),
        ({"more": 1}, "state's cartridge"),
        (None, "token ids that are not in"),
    ],
)
def test_a_virtual_id_is_never_taken_for_a_token(change: Any, message: str, load: Load) -> None:
    source, target = load(), load()
    source.load_cartridge(noise(source, 40, seed=1, name="c"))
    run(source, QUESTION, 3, cartridge="c", sequence_id="part")
    (seq,) = HfPager(source, ["part"]).logical_seqs()
    state = dict(seq.state)
    if change is None:
        del state["cartridge"]
    else:
        state["cartridge"] = state["cartridge"] | change
    with pytest.raises(InvalidInput, match=message):
        _install(source, target, replace(seq, state=state))
    target.check_integrity()
    assert target.sequences() == []
    with pytest.raises(InvalidInput, match="token ids are in"):
        target.submit([VIRTUAL], params(1))


def test_a_page_under_another_salt_is_refused(load: Load) -> None:
    """Pages name their blocks; a sequence that says another cartridge makes other blocks of the same ids."""
    source, target = load(), load()
    source.load_cartridge(noise(source, 40, seed=1, name="c"))
    run(source, QUESTION, 3, cartridge="c", sequence_id="part")
    (seq,) = HfPager(source, ["part"]).logical_seqs()
    told = seq.state["cartridge"] | {"identity": "0" * 64}
    with pytest.raises(InvalidInput, match="holds the page of block"):
        _install(source, target, replace(seq, state=seq.state | {"cartridge": told}))
    carry(source, target, "part")
    assert run(target, [], 5, resume="part") == run(source, [], 5, resume="part")


def _install(source: Engine, target: Engine, seq: LogicalSeq) -> None:
    reader, writer = HfPager(source), HfPager(target)
    buffer = bytearray(2 * reader.meta().page_bytes * len(seq.page_ixs))
    reader.read_pages(seq.page_ixs, memoryview(buffer))
    slots = writer.allocate_pages(len(seq.page_ixs))
    try:
        writer.write_pages(slots, memoryview(bytes(buffer)), reader.page_blocks(seq.page_ixs))
        writer.install_logical_seqs([replace(seq, page_ixs=tuple(slots))])
    except InvalidInput:
        writer.release_pages(slots)
        raise
