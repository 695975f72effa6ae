"""Snapshot, fork, checkout and the log over a fake engine: what is stored, answered and refused."""

from __future__ import annotations

import asyncio
import dataclasses
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvist import errors
from kvist.layout import Layout
from kvist.repo import RefKind, gc, lease
from kvist.testing.vllm_core import LAYOUT

from .conftest import IDS, PATH, AsgiCall, Live, error_of

SLIDING = [
    [
        dataclasses.replace(LAYOUT, tp_rank=rank, tp_size=2, group=0, n_groups=2),
        dataclasses.replace(LAYOUT, tp_rank=rank, tp_size=2, group=1, n_groups=2, attention="sliding:6", n_layers=3),
    ]
    for rank in range(2)
]


def test_a_round_trip(live: Live, serve: Callable[..., Live]) -> None:
    taken = live.ask("snapshot", request_id="a", name="demo", message="why")
    assert taken["sequences"] == [{"id": "cmpl-a-0", "tokens": 11, "cached_tokens": 10}]
    assert taken["branch"] == taken["name"] == "demo"
    assert (taken["tokens"], taken["pages"], taken["pages_copied"], taken["parents"]) == (10, 3, 3, [])
    assert taken["new_bytes"] == 6 * LAYOUT.page_bytes
    assert 0 < taken["pause_ms"] <= taken["total_ms"]
    assert live.engine.captures == {}
    assert live.engine.log[:2] == ["describe", "begin"] and live.engine.log[-1] == "release"

    other = serve()
    done = other.ask("checkout", cid="demo", preload=True)
    assert done["ok"] is done["bit_exact"] is True
    assert done["cid"] == taken["cid"]
    assert done["sequences"] == taken["sequences"]
    assert (done["restored_tokens"], done["pages"], done["pages_loaded"]) == (10, 3, 3)
    assert done["differences"] == done["not_carried"] == {}
    assert done["total_ms"] > 0
    expected = [live.engine.page(0, 0, IDS[:end]) for end in (4, 8, 10)]
    assert other.engine.restored(taken["cid"], "cmpl-a-0") == [[expected]]
    assert other.ask("checkout", cid=taken["cid"])["pages_loaded"] == 0


def test_ranks_and_groups(serve: Callable[..., Live]) -> None:
    live = serve(SLIDING)
    live.engine.add("cmpl-a-0", IDS)
    taken = live.ask("snapshot", request_id="a", name="demo")
    shown = live.get(f"{PATH}/snapshots/demo").json()
    assert len(shown["manifests"]) == 4
    assert [layout["attention"] for layout in shown["layouts"]] == ["full", "sliding:6"]
    assert shown["layout"] == shown["layouts"][0]
    assert shown["pages"] == taken["pages"] == 6
    with live.repo() as repo:
        manifests = [repo.manifest(cid) for cid in shown["manifests"]]
        assert [(m.layout.tp_rank, m.layout.group) for m in manifests] == [(0, 0), (0, 1), (1, 0), (1, 1)]
        assert manifests[1].sequences[0].first_page == 1
    other = serve(SLIDING)
    done = other.ask("checkout", cid="demo", sequences=["cmpl-a-0"], preload=True)
    assert done["sequences"] == [{"id": "cmpl-a-0", "tokens": 11, "cached_tokens": 10}]
    assert (done["restored_tokens"], done["pages"]) == (10, 5)
    pages = [[[live.engine.page(r, g, IDS[:end]) for end in (4, 8, 10)[g:]] for g in range(2)] for r in range(2)]
    assert other.engine.restored(done["cid"], "cmpl-a-0") == pages


def test_the_whole_engine(live: Live, serve: Callable[..., Live]) -> None:
    live.engine.add("cmpl-a-1", [*IDS, 20, 21, 22])
    first = live.ask("snapshot", name="all")
    assert [seq["id"] for seq in first["sequences"]] == ["cmpl-a-0", "cmpl-a-1"]
    assert live.ask("snapshot")["branch"] == "main"
    assert live.ask("snapshot", request_id="a")["branch"] == "seq/cmpl-a"
    assert live.ask("snapshot", sequence="cmpl-a-1")["branch"] == "seq/cmpl-a-1"
    assert live.get(f"{PATH}/snapshots").json()["total"] == 4
    empty = serve().ask("snapshot", name="nothing")
    assert (empty["pages"], empty["sequences"], empty["tokens"]) == (0, [], 0)


def test_heads_become_parents(live: Live) -> None:
    one = live.ask("snapshot", request_id="a")
    live.engine.add("cmpl-a-0", [*IDS, 5, 6, 7])
    two = live.ask("snapshot", request_id="cmpl-a-0", name="later")
    assert two["parents"] == [one["cid"]]
    assert two["pages_copied"] == 2 < two["pages"] == 4
    whole = live.ask("snapshot")
    assert whole["parents"] == []
    live.ask("checkout", cid=one["cid"])
    assert live.ask("snapshot")["parents"] == [whole["cid"], one["cid"]]
    # a branch's tip is never lost
    live.engine.add("cmpl-b-0", [1, 2, 3, 4, 5])
    assert live.ask("snapshot", request_id="b", branch="later")["parents"] == [two["cid"]]
    body = {"request_id": "b", "branch": "later", "parents": [one["cid"]]}
    before = live.engine.calls["begin"]
    error_of(live.post(f"{PATH}/snapshot", body), 409, "conflict")
    error_of(live.post(f"{PATH}/snapshot", body | {"parents": ["nowhere"]}), 404, "not_found")
    assert live.engine.calls["begin"] == before
    graph = live.get(f"{PATH}/lineage").json()
    assert len(graph["nodes"]) == 5
    assert graph["heads"] == [live.get(f"{PATH}/snapshots/main").json()["cid"]]


def test_a_request_that_goes_on_has_its_snapshot_as_parent(live: Live) -> None:
    taken = live.ask("snapshot", request_id="a", name="demo")
    sent = live.post("/v1/completions", {"kv_transfer_params": {"snapshot": "demo"}}, **{"X-Request-Id": "mine"})
    assert sent.status_code == 200
    live.engine.add("0_cmpl-mine-0", [*IDS, 30])
    assert live.ask("snapshot", request_id="mine")["parents"] == [taken["cid"]]
    sent = live.post("/v1/chat/completions", {"kv_transfer_params": {"snapshot": "demo"}})
    name = dict(eval_headers(sent))["x-request-id"]
    live.engine.add(f"chatcmpl-{name}", [*IDS, 31])
    assert live.ask("snapshot", request_id=name)["parents"] == [taken["cid"]]


def eval_headers(answer: Any) -> dict[str, str]:
    import json

    return dict(json.loads(answer.headers["x-headers"]))


def test_forks(live: Live) -> None:
    taken = live.ask("snapshot", request_id="a", name="demo")
    forks = live.ask("fork", cid="demo", n=12, name="try")
    assert forks["branches"] == [f"try/{n}" for n in range(12)]
    done = live.ask("checkout", cid="try/3")
    assert done["cid"] == forks["cids"][3]
    assert live.get(f"{PATH}/snapshots/try/3").json()["parents"] == [taken["cid"]]
    assert live.get(f"{PATH}/snapshots?rev=try/3&limit=1").json()["total"] == 2
    error_of(live.post(f"{PATH}/fork", {"cid": "demo", "n": 1, "name": "try"}), 409, "already_exists")


def test_what_a_checkout_cannot_carry(live: Live, serve: Callable[..., Live]) -> None:
    live.engine.add("cmpl-b-0", IDS, not_carried=["structured output: its grammar starts anew"])
    live.ask("snapshot", name="demo")
    other = serve(numerics={"threads": 8, "attention": "avx2", "eager": True})
    done = other.ask("checkout", cid="demo")
    assert done["bit_exact"] is False
    assert done["differences"] == {
        "eager": {"snapshot": None, "engine": True},
        "threads": {"snapshot": 4, "engine": 8},
    }
    assert done["not_carried"] == {"cmpl-b-0": ["structured output: its grammar starts anew"]}


# -- pauses, and what is held meanwhile ----------------------------------------------------------------------------


def test_pausing_only_where_it_must(serve: Callable[..., Live]) -> None:
    live = serve(async_scheduling=True)
    live.engine.add("cmpl-greedy-0", IDS)
    live.ask("snapshot", request_id="greedy")
    assert live.engine.calls["pause"] == 0
    live.engine.add("cmpl-seeded-0", IDS, draws=True)
    live.engine.log.clear()
    live.ask("snapshot", request_id="seeded")
    assert live.engine.log[:4] == ["begin", "pause", "begin", "resume"]
    assert live.engine.log[-1] == "release"


def test_generation_goes_on_after_an_error(serve: Callable[..., Live]) -> None:
    live = serve(async_scheduling=True)
    live.engine.add("cmpl-seeded-0", IDS, draws=True)

    async def go() -> Any:
        gate = live.engine.gates["begin"] = asyncio.Event()
        gate.set()
        asking = asyncio.create_task(live.http.post(f"{PATH}/snapshot", json={}))
        while not live.engine.paused:
            await asyncio.sleep(0)
        live.engine.failing["begin"] = errors.StoreError("the disk is gone")
        return await asking

    error_of(live.run(go()), 503, "store")
    assert live.engine.calls["pause"] == live.engine.calls["resume"] == 1
    assert not live.engine.paused


def test_somebody_elses_pause_stays(serve: Callable[..., Live]) -> None:
    live = serve(async_scheduling=True)
    live.engine.add("cmpl-seeded-0", IDS, draws=True)
    live.run(live.engine.pause_generation(mode="keep", clear_cache=False))
    live.ask("snapshot")
    assert live.engine.paused
    assert live.engine.calls["resume"] == 0


@pytest.mark.parametrize("op", ["copy", "finish"])
def test_captures_are_released_after_errors(live: Live, op: str) -> None:
    live.engine.failing[op] = errors.StoreFull("no space left on device", hint="make room")
    message = error_of(live.post(f"{PATH}/snapshot", {"name": "x"}), 507, "store_full")["message"]
    assert message == "no space left on device (make room)"
    assert live.engine.captures == {}
    live.engine.failing.clear()
    assert live.ask("snapshot", name="x")["pages"] == 3


@pytest.mark.parametrize("how", ["disconnect", "cancel"])
@pytest.mark.parametrize("op", ["copy", "begin"])
def test_clients_that_go_away(serve: Callable[..., Live], how: str, op: str) -> None:
    live = serve(async_scheduling=True)
    live.engine.add("cmpl-seeded-0", IDS, draws=True)

    async def go() -> None:
        gate = live.engine.gates[op] = asyncio.Event()
        call = AsgiCall(f"{PATH}/snapshot")
        call.body(b'{"name": "demo"}')
        task = call.start(live.app)
        while not live.engine.calls[op]:
            await asyncio.sleep(0.001)
        if how == "cancel":
            task.cancel()
        else:
            call.disconnect()
        await asyncio.sleep(0.01)
        gate.set()
        await asyncio.gather(task, return_exceptions=True)

    live.run(go())
    live.settle()
    assert not live.engine.paused
    assert live.engine.captures == {}
    assert live.engine.calls["release"] == 1
    assert live.get(f"{PATH}/snapshots/demo").status_code == 200  # whole, for the client that asks again


def test_snapshots_at_once(serve: Callable[..., Live]) -> None:
    live = serve(async_scheduling=True)
    for name in "abcdef":
        live.engine.add(f"cmpl-{name}-0", [ord(name), *IDS], draws=name < "d")

    async def go() -> Any:
        asked = [*"abcdef", "a", None]
        bodies = [{"branch": "one"} | ({"request_id": name} if name else {}) for name in asked]
        return await asyncio.gather(*(live.http.post(f"{PATH}/snapshot", json=body) for body in bodies))

    answers = [answer.json() for answer in live.run(go())]
    assert all("cid" in answer for answer in answers), answers
    assert live.engine.captures == {} and not live.engine.paused
    # each continues the one before: the branch lost none
    assert live.get(f"{PATH}/snapshots?rev=one").json()["total"] == len(answers)


def test_another_process_moves_the_branch(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    live.ask("snapshot", name="demo")
    from kvist.repo import Repository

    commit = Repository.commit
    met = []

    def meeting(self: Repository, *args: Any, **kwargs: Any) -> Any:
        if not met:
            with live.repo() as repo:
                fork = repo.fork("demo", 1)[0]
                met.append(repo.branch("demo", fork.cid, move=True).cid)
        return commit(self, *args, **kwargs)

    monkeypatch.setattr(Repository, "commit", meeting)
    assert met[0:] == []
    taken = live.ask("snapshot", request_id="a", branch="demo")
    assert met[0] in taken["parents"]


# -- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"request_id": "nobody"}, 404, "not_found"),
        ({"request_id": "a", "sequence": "cmpl-a-0"}, 400, "invalid_input"),
        ({"name": "../x"}, 400, "invalid_name"),
        ({"nonsense": 1}, 400, "invalid_input"),
        ({"parents": ["nowhere"], "name": "x"}, 404, "not_found"),
    ],
)
def test_snapshots_that_are_refused(live: Live, body: dict[str, Any], status: int, code: str) -> None:
    error_of(live.post(f"{PATH}/snapshot", body), status, code)
    assert live.engine.captures == {}


def test_checkouts_that_are_refused(live: Live) -> None:
    live.ask("snapshot", name="demo")
    error_of(live.post(f"{PATH}/checkout", {"cid": "nowhere"}), 404, "not_found")
    error_of(live.post(f"{PATH}/checkout", {"cid": "demo", "sequences": ["other"]}), 404, "not_found")
    error_of(live.post(f"{PATH}/checkout", {}), 400, "invalid_input")
    error_of(live.post(f"{PATH}/checkout", {"cid": "demo", "preload": "yes"}), 400, "invalid_input")
    error_of(live.get(f"{PATH}/snapshots/nowhere"), 404, "not_found")
    error_of(live.get(f"{PATH}/snapshots?limit=0"), 400, "invalid_input")
    error_of(live.get(f"{PATH}/nothing"), 404, "not_found")
    error_of(live.get(f"{PATH}/checkout"), 405, "method_not_allowed")
    assert live.engine.calls["checkout"] == 0


@pytest.mark.parametrize(
    "change",
    [
        {"page_size_tokens": 8}, {"n_layers": 1}, {"n_heads": 2}, {"head_dim": 8}, {"dtype": "bf16"},
        {"model": "other"}, {"revision": "2"}, {"memory_order": "vllm-hnd"}, {"tp_size": 2},
        {"attention": "mla"}, {"n_groups": 2},
    ],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_other_layouts(live: Live, serve: Callable[..., Live], change: dict[str, Any]) -> None:
    live.ask("snapshot", request_id="a", name="demo")
    layout: Layout = dataclasses.replace(LAYOUT, **change)
    rows = [[layout]]
    if "tp_size" in change:
        rows.append([dataclasses.replace(layout, tp_rank=1)])
    if "n_groups" in change:
        rows[0].append(dataclasses.replace(layout, group=1))
    other = serve(rows)
    (name, value), *_ = change.items()
    for path, body in (
        (f"{PATH}/checkout", {"cid": "demo"}),
        ("/v1/completions", {"kv_transfer_params": {"snapshot": "demo"}}),
    ):
        message = error_of(other.post(path, body), 409, "layout_mismatch")["message"]
        assert f"{name} {getattr(LAYOUT, name)!r} there, {value!r} here" in message
    assert other.engine.calls["checkout"] == 0


def test_a_missing_rank(serve: Callable[..., Live]) -> None:
    live = serve(SLIDING)
    live.engine.add("cmpl-a-0", IDS)
    cid = live.ask("snapshot", name="demo")["cid"]
    with live.repo() as repo:
        parts = [repo.manifest(name) for name in repo.snapshot(cid).manifests]
        repo.commit(parts[:3], branch="part")
    message = error_of(live.post(f"{PATH}/checkout", {"cid": "part"}), 409, "layout_mismatch")["message"]
    assert "rank 1, group 1" in message


def damage(live: Live) -> None:
    for path in (live.store / "segments").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            data = bytearray(path.read_bytes())
            data[5] ^= 1
            path.write_bytes(data)


def test_a_flipped_bit(live: Live, serve: Callable[..., Live]) -> None:
    live.ask("snapshot", request_id="a", name="demo")
    damage(live)
    other = serve()
    error_of(other.post(f"{PATH}/checkout", {"cid": "demo"}), 500, "damaged_page")
    named = {"kv_transfer_params": {"snapshot": "demo"}}
    error_of(other.post("/v1/completions", named), 500, "damaged_page")
    assert other.engine.calls["checkout"] == 0
    # unverified: the workers find it
    error_of(other.post(f"{PATH}/checkout", {"cid": "demo", "verify": False, "preload": True}), 500, "damaged_page")


def test_pages_that_are_gone(live: Live, serve: Callable[..., Live]) -> None:
    live.ask("snapshot", request_id="a", name="demo")
    shutil.rmtree(live.store / "segments")
    error_of(serve().post(f"{PATH}/checkout", {"cid": "demo"}), 500, "missing_page")


def test_damaged_objects(live: Live, serve: Callable[..., Live]) -> None:
    live.ask("snapshot", request_id="a", name="demo")
    for path in (live.store / "manifests").rglob("*"):
        if path.is_file():
            path.chmod(0o644)
            path.write_bytes(path.read_bytes()[:-10])
    other = serve()
    error_of(other.post(f"{PATH}/checkout", {"cid": "demo"}), 500, "damaged_object")
    error_of(other.get(f"{PATH}/snapshots/demo"), 500, "damaged_object")


def test_a_store_that_is_lost_and_found(live: Live, tmp_path: Path) -> None:
    live.ask("snapshot", request_id="a", name="demo")
    live.store.rename(tmp_path / "elsewhere")
    for answer in (
        live.post(f"{PATH}/checkout", {"cid": "demo"}),
        live.post("/v1/completions", {"kv_transfer_params": {"snapshot": "demo"}}),
        live.get(f"{PATH}/snapshots/demo"),
    ):
        error_of(answer, 503, "store")
    assert live.post("/v1/completions", {"prompt": "plain"}).status_code == 200
    (tmp_path / "elsewhere").rename(live.store)
    assert live.ask("checkout", cid="demo")["ok"]


def test_a_store_that_comes_later(serve: Callable[..., Live], tmp_path: Path) -> None:
    (tmp_path / "mount").write_text("not yet a directory")
    live = serve(store=tmp_path / "mount" / "store")
    live.settle()
    error_of(live.get(f"{PATH}/snapshots"), 503, "store")
    error_of(live.post(f"{PATH}/snapshot", {}), 503, "store")
    (tmp_path / "mount").unlink()
    assert live.get(f"{PATH}/snapshots").json() == {"snapshots": [], "total": 0}
    assert live.ask("snapshot")["branch"] == "main"


def test_a_store_that_cannot_be_read(serve: Callable[..., Live], tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "kvist.json").write_text('{"format":"something else"}')
    message = error_of(serve().get(f"{PATH}/snapshots"), 503, "store")["message"]
    assert "kvist.json" in message


def test_tags_and_gc_between(live: Live) -> None:
    """A head that nothing names any more is no parent."""
    first = live.ask("snapshot", request_id="a", name="demo")
    with live.repo() as repo:
        repo.delete_ref(RefKind.BRANCH, "demo")
        from kvist.repo.objects import snapshot_key

        repo.store.delete([snapshot_key(first["cid"])])
    assert live.ask("snapshot", request_id="a", name="again")["parents"] == []


def test_a_gc_leaves_what_is_checked_out(live: Live) -> None:
    """The engine reads its pages only when a request needs them."""
    live.engine.add("cmpl-a-0", IDS)
    taken = live.ask("snapshot", request_id="a", name="demo")
    live.ask("checkout", cid=taken["cid"])
    with live.repo() as repo:
        while repo.resolve("demo") not in lease.read(repo.store).cids:
            time.sleep(0.01)
        repo.delete_ref(RefKind.BRANCH, "demo")
        assert gc.apply(repo, gc.plan(repo, min_age=0)).is_empty
        assert repo.snapshot(taken["cid"]).tokens == taken["tokens"]
