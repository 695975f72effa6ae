"""From the API process's calls to tensors and back: captures, checkouts and loads over a plain paged engine."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.engines.paged import answers
from kvist.engines.paged.plans import Load, Place
from kvist.errors import EngineError, InvalidInput, KvistError, NotFound, StoreFull
from kvist.repo import Repository, Snapshot
from kvist.server.live.client import Captured, Core
from kvist.server.live.parts import payload_of, read_parts
from kvist.server.live.snapshots import Snapshots
from kvist.server.schema import SnapshotBody

from .plain import SIZE, Plain

IDS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
"""Ten computed tokens: two full pages, and two tokens of a third."""
HELD = [5, 2, 9]

Start = Callable[..., Plain]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[Plain] = []

    def start(**settings: Any) -> Plain:
        started.append(Plain(tmp_path / "kv", **settings))
        return started[-1]

    yield start
    for each in started:
        each.close()


def captured(engine: Plain, wanted: str | None = "one") -> Captured:
    return asyncio.run(Core(engine).capture(wanted))


def commit(engine: Plain, found: Captured) -> Snapshot:
    with Repository.open(engine.store) as repo:
        return repo.commit([repo.manifest(cid) for rank in found.manifests for cid in rank])


def check_out(engine: Plain, cid: str) -> Core:
    async def go() -> Core:
        core = Core(engine)
        with Repository.open(engine.store) as repo:
            await core.check_out(payload_of(repo, read_parts(repo, cid, await core.describe())))
        return core

    return asyncio.run(go())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_request_goes_on_in_another_engine(start: Start, ranks: int) -> None:
    engine = start(ranks=ranks)
    engine.add("one", IDS, HELD)
    found = captured(engine)
    assert (found.pages, found.pages_copied) == (3, 3)
    assert found.new_bytes == ranks * 3 * 2 * engine.layouts[0].page_bytes
    cid = commit(engine, found).cid

    other = start(ranks=ranks)
    check_out(other, cid)
    other.load(cid, "one", [7, 8, 11])
    for mine, theirs in zip(engine.by_rank, other.by_rank, strict=True):
        for block, there, fill in zip(HELD, [7, 8, 11], [SIZE, SIZE, 2], strict=True):
            assert torch.equal(mine.page(block, fill), theirs.page(there, fill))
        assert theirs.mover.arrivals.take() == ({"request"}, set(), set())


def test_a_second_capture_copies_what_is_new(start: Start) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    captured(engine)
    engine.add("one", [*IDS, 8, 9], HELD)  # two tokens more, in the last page
    again = captured(engine)
    assert (again.pages, again.pages_copied) == (3, 1)


def test_what_was_loaded_is_known_and_not_copied(start: Start) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    cid = commit(engine, captured(engine)).cid
    check_out(engine, cid)
    engine.load(cid, "one", [7, 8, 11])
    engine.add("two", IDS, [7, 8, 11])
    assert captured(engine, "two").pages_copied == 0


def test_a_page_that_is_reused_drops_out(start: Start) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    engine.loose, engine.lost = [12, 13, 14], [(0, 13)]
    found = captured(engine, None)
    with Repository.open(engine.store) as repo:
        ((cid,),) = found.manifests
        assert {page.ix for page in repo.manifest(cid).pages} == {*HELD, 12, 14}


def test_a_pause_where_the_engine_asks_for_one(start: Start) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    engine.needs_pause = True
    captured(engine)
    assert engine.paused == 2


def test_a_capture_is_let_go_however_it_ends(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = start(ranks=2)
    engine.add("one", IDS, HELD)

    def fail(*_: Any) -> None:
        raise StoreFull("no room")

    for what in ("captures.begin", "repo.put_pages", "repo.objects.put_manifests"):
        with monkeypatch.context() as patch:
            owner, _, name = what.rpartition(".")
            patch.setattr(operator.attrgetter(owner)(engine.by_rank[1].mover), name, fail)
            with pytest.raises(StoreFull, match="no room"):
                captured(engine)
        assert not engine.kept
    assert captured(engine).pages == 3 and not engine.kept


def test_a_name_that_ends_in_a_number_is_no_choice_of_another(start: Start) -> None:
    engine = start()
    engine.add("user", IDS, HELD)
    engine.add("user-1", IDS, [7, 8, 11])

    async def go() -> list[dict[str, Any]]:
        snapshots = Snapshots()
        snapshots.attach(engine)
        return [await snapshots.snapshot(SnapshotBody(request_id=name)) for name in ("user", "user-1")]

    first, second = asyncio.run(go())
    assert (first["branch"], second["branch"]) == ("seq/user", "seq/user-1")
    assert not first["parents"] and not second["parents"]


def test_preload_brings_all_into_host_memory(start: Start) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    cid = commit(engine, captured(engine)).cid
    other = start()
    core = check_out(other, cid)
    loaded = asyncio.run(core.preload(cid))
    assert (loaded.pages, loaded.pages_loaded) == (3, 3)
    read = other.by_rank[0].mover.stats()["pages_read"]
    other.load(cid, "one", [7, 8, 11])
    assert other.by_rank[0].mover.stats()["pages_read"] == read == 3


def test_a_damaged_page_is_no_page(start: Start, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    cid = commit(engine, captured(engine)).cid
    (segment,) = (tmp_path / "kv" / "segments").iterdir()
    data = bytearray(segment.read_bytes())
    data[engine.layouts[0].page_bytes] ^= 1  # some page's: there are six halves
    segment.chmod(0o644)
    segment.write_bytes(data)
    other = start()
    check_out(other, cid)
    other.load(cid, "one", [7, 8, 11])
    mover = other.by_rank[0].mover
    assert mover.arrivals.take() == (set(), {"request"}, {7, 8, 11})
    assert "is damaged" in caplog.text


def test_the_durable_prefix_cache(start: Start) -> None:
    engine = start(cache_bytes=0)
    one = engine.add("one", IDS, HELD)
    places = [Place(0, block, 0, SIZE, name.hex()) for block, name in zip(HELD, one.names, strict=False)]
    engine.by_rank[0].mover.save(places, [])
    engine.close()

    other = start(cache_bytes=0)
    other.bring(Load("request", None, [(Place(0, 7, 1, SIZE), one.names[0].hex())]))
    assert torch.equal(engine.by_rank[0].page(HELD[0]), other.by_rank[0].page(7))
    other.bring(Load("another", None, [(Place(0, 8, 1, SIZE), "ab" * 32)]))
    report = other.by_rank[0].mover.arrivals.take_report()
    assert report is not None and report.failed == ["another"] and report.gone == [(0, "ab" * 32)]


@pytest.mark.parametrize(
    ("op", "payload", "kind"),
    [
        ("nonsense", {}, InvalidInput),
        ("begin", {"request_id": "nobody"}, NotFound),
        ("preload", {"cid": "sha256:nothing"}, NotFound),
        ("copy", {}, EngineError),
    ],
)
def test_errors_are_values(start: Start, op: str, payload: dict[str, Any], kind: type[KvistError]) -> None:
    engine = start()
    assert answers.answer(op, lambda: answers.call(engine, op, payload))["error"]["kind"] == kind.kind


def test_an_answer_that_cannot_be_sent_is_an_error() -> None:
    assert answers.answer("op", lambda: {"value": object()})["error"]["kind"] == "engine"


def test_stats_and_checkouts(start: Start) -> None:
    engine = start()
    engine.add("one", IDS, HELD)
    cid = commit(engine, captured(engine)).cid
    core = check_out(engine, cid)
    assert asyncio.run(core.checkouts()) == [cid]
    engine.load(cid, "one", [7, 8, 11])
    stats = asyncio.run(core.stats())
    assert (stats["loads"], stats["pages_loaded"], stats["pages_captured"]) == (1, 3, 3)
