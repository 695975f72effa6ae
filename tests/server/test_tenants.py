"""Two tenants and the default on one engine: neither finds, lists, drops, captures or reuses what is another's."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp

from kvist.engines.hf import Engine, HfPager, OwnedEngine, Owner, SamplingParams
from kvist.errors import InvalidName, NotFound, StoreError
from kvist.repo import RefKind, Repository
from kvist.server import Tokenizer, create_app
from kvist.server.access import Access, Guard
from kvist.server.tenants import TenantApps, open_tenant
from kvist.server.tokens import Grant, Scope, Tokens, add_token
from kvist.store import PrefixStore, Quota, ReadOnlyStore, open_store

from .conftest import error_of, running

PROMPT = list(range(5, 70))
WHO = ("default", "acme", "umbrella")


class Shared:
    """A server with tokens for two tenants and the default, and a client for each."""

    def __init__(self, url: str, texts: dict[str, str], engine: Engine, store: Path) -> None:
        self.engine, self.store = engine, store
        self.texts = texts
        self.clients = {
            name: httpx2.Client(base_url=url, timeout=None, headers={"Authorization": f"Bearer {text}"})
            for name, text in texts.items()
        }

    def complete(self, who: str, prompt: Any = PROMPT, **body: Any) -> Any:
        document = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "return_token_ids": True, **body}
        got = self.clients[who].post("/v1/completions", json=document)
        assert got.status_code == 200, got.text
        return got.json()

    def call(self, who: str, what: str, **body: Any) -> Any:
        got = self.clients[who].post(f"/v1/processfork/{what}", json=body)
        assert got.status_code == 200, got.text
        return got.json()

    def get(self, who: str, path: str) -> Any:
        got = self.clients[who].get(f"/v1/processfork/{path}")
        assert got.status_code == 200, got.text
        return got.json()

    def names(self, who: str) -> list[str]:
        return [each["id"] for each in self.get(who, "sequences")["sequences"]]


@contextlib.contextmanager
def sharing(engine: Engine, model_dir: Path, directory: Path) -> Iterator[Shared]:
    path = directory / "tokens.json"
    texts = {who: add_token(path, who, Scope.WRITE, tenant=None if who == "default" else who) for who in WHO}
    store = open_store(directory / "store")
    with contextlib.ExitStack() as stack:

        def app_of(tenant: str | None, repo: Repository) -> Starlette:
            view = OwnedEngine(engine, Owner(tenant, stack.enter_context(repo).config.block_salt))
            tokenizer = Tokenizer.load(model_dir)
            return create_app(view, repo, pager=HfPager, params=SamplingParams, tokenizer=tokenizer)

        default = app_of(None, Repository.open(store, create=True))
        apps = TenantApps(default, lambda name: app_of(name, open_tenant(store, name, Repository.open)))
        with running(Guard(apps, Access(Tokens(path)))) as url:
            shared = Shared(url, texts, engine, directory / "store")
            yield shared
            for client in shared.clients.values():
                client.close()


@pytest.fixture(scope="module")
def shared(engine: Engine, model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with sharing(engine, model_dir, tmp_path_factory.mktemp("shared")) as shared:
        yield shared


def test_no_tenants_prompt_is_found_in_anothers_cache(shared: Shared) -> None:
    """The same tokens for all; `cached_tokens` tells only of one's own."""
    prompt = [each + 100 for each in PROMPT]
    answers = {}
    for who in WHO:
        first, again = (shared.complete(who, prompt) for _ in range(2))
        answers[who] = first["choices"][0]["token_ids"]
        assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0, who
        assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0, who
    assert answers["default"] == answers["acme"] == answers["umbrella"]


def test_sequences_are_ones_own(shared: Shared) -> None:
    ids = {who: shared.complete(who)["id"] for who in WHO}
    for who in WHO:
        names = shared.names(who)
        assert ids[who] in names
        assert not {ids[other] for other in WHO if other != who} & set(names)
        assert not any("tenants/" in name for name in names)
        for other in WHO:
            if other == who:
                continue
            for name in (ids[other], f"tenants/{other}/{ids[other]}"):
                error_of(shared.clients[who].delete(f"/v1/processfork/sequences/{name}"), 404, "not_found")
                body = {"sequence": name}
                error_of(shared.clients[who].post("/v1/processfork/snapshot", json=body), 404, "not_found")
            body = {"request_id": ids[other]}
            error_of(shared.clients[who].post("/v1/processfork/snapshot", json=body), 404, "not_found")
    for who in WHO:
        assert shared.clients[who].delete(f"/v1/processfork/sequences/{ids[who]}").status_code == 200


def test_snapshots_are_ones_own(shared: Shared) -> None:
    made = {}
    for who in WHO:
        answer = shared.complete(who, PROMPT, max_tokens=8)
        made[who] = shared.call(who, "snapshot", request_id=answer["id"], name="mine")["cid"]
    assert len(set(made.values())) == 3  # pages of equal content have unrelated digests
    for who in WHO:
        assert shared.get(who, "snapshots/mine")["cid"] == made[who]
        assert {each["cid"] for each in shared.get(who, "snapshots")["snapshots"]} & set(made.values()) == {made[who]}
        for other in WHO:
            if other != who:
                cid = made[other]
                error_of(shared.clients[who].get(f"/v1/processfork/snapshots/{cid}"), 404, "not_found")
                for what in ("fork", "checkout"):
                    error_of(shared.clients[who].post(f"/v1/processfork/{what}", json={"cid": cid}), 404, "not_found")
                body = {"kv_transfer_params": {"snapshot": cid}, "max_tokens": 1}
                error_of(shared.clients[who].post("/v1/completions", json=body), 404, "not_found")
    ids = set()
    for who in WHO:
        fork = shared.call(who, "fork", cid="mine", n=2)
        ids |= set(fork["cids"])
        back = shared.call(who, "checkout", cid=fork["cids"][1])
        assert back["restored_tokens"] > 0 and back["bit_exact"]
        going = shared.complete(who, None, kv_transfer_params={"snapshot": fork["cids"][1]})
        assert going["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
        assert all(fork["cids"][1][7:19] in each["engine_id"] for each in back["sequences"])
        assert all(each["engine_id"] in shared.names(who) for each in back["sequences"])
    assert len(ids) == 6


def test_a_snapshot_of_everything_holds_ones_own_only(shared: Shared) -> None:
    ids = {who: shared.complete(who)["id"] for who in WHO}
    for who in WHO:
        whole = shared.call(who, "snapshot", branch="whole")
        held = {each["id"] for each in whole["sequences"]}
        assert ids[who] in held and not held & {ids[other] for other in WHO if other != who}
        again = shared.call(who, "snapshot", branch="whole")
        assert again["pages_copied"] < again["pages"]  # full pages are known by their blocks, which are salted


def test_repositories_lie_apart_and_have_their_own_salts(shared: Shared) -> None:
    for who in WHO:
        shared.call(who, "snapshot", request_id=shared.complete(who)["id"], name="apart")
    salts, digests, blocks = set(), [], []
    root = open_store(shared.store)
    for who in WHO:
        store = root if who == "default" else PrefixStore(root, f"tenants/{who}")
        with Repository.open(store) as repo:
            salts.add(repo.config.salt)
            manifest = repo.manifest(repo.snapshot("apart").manifests[0])
            digests.append(set(manifest.digests))
            blocks.append({page.block for page in manifest.pages if page.block is not None})
            assert repo.pages.verify(list(manifest.digests)) == []
            assert [ref.name for ref in repo.refs.all(RefKind.BRANCH)]
    assert len(salts) == 3 and "" in salts
    assert all(blocks)
    for number in range(3):
        for other in range(number):
            assert not digests[number] & digests[other] and not blocks[number] & blocks[other]


def test_a_tenant_sees_nothing_of_the_whole_server(shared: Shared) -> None:
    error_of(shared.clients["acme"].get("/metrics"), 403, "forbidden")
    assert shared.clients["default"].get("/metrics").status_code == 200


def test_a_tenants_quota(engine: Engine, model_dir: Path, tmp_path: Path) -> None:
    root = open_store(tmp_path / "store")
    with open_tenant(root, "acme", Repository.open) as repo:
        assert repo.config.salt
        repo.set_quota(Quota(max_bytes=100_000, max_snapshots=2))
    with sharing(engine, model_dir, tmp_path) as shared:
        id = shared.complete("acme", PROMPT)["id"]
        first = shared.call("acme", "snapshot", request_id=id, name="first")
        assert first["new_bytes"] > 0
        long = shared.complete("acme", [3 + each % 90 for each in range(900)])["id"]
        refused = shared.clients["acme"].post("/v1/processfork/snapshot", json={"request_id": long, "name": "long"})
        assert "the limit is 100000" in error_of(refused, 507, "store_full")["message"]
        shared.call("acme", "fork", cid="first", n=1)
        too_many = shared.clients["acme"].post("/v1/processfork/fork", json={"cid": "first", "n": 1})
        assert "the limit is 2" in error_of(too_many, 507, "store_full")["message"]
        shared.call("umbrella", "snapshot", request_id=shared.complete("umbrella", PROMPT)["id"], name="b")
        assert {each["cid"] for each in shared.get("acme", "snapshots")["snapshots"]} >= {first["cid"]}


def test_no_token_is_ever_logged(shared: Shared, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shared.complete("acme")
    for path in ("/version", "/nothing", "/v1/processfork/snapshots/nothing"):
        for text in (shared.texts["acme"], "kvist_wrong-token", ""):
            shared.clients["acme"].get(path, headers={"Authorization": f"Bearer {text}x"})
    for record in caplog.records:
        for text in (*shared.texts.values(), "kvist_wrong-token"):
            assert text not in record.getMessage() and text not in str(record.exc_info)


def test_a_tenants_repository_has_a_salt(tmp_path: Path) -> None:
    root = open_store(tmp_path / "store")
    Repository.init(PrefixStore(root, "tenants/acme")).close()
    with pytest.raises(StoreError, match="has no salt") as refused:
        open_tenant(root, "acme", Repository.open)
    assert "kvist init --salted" in (refused.value.hint or "")
    with open_tenant(root, "umbrella", Repository.open) as one, open_tenant(root, "umbrella", Repository.open) as two:
        assert one.config == two.config and one.config.salt
    for wrong in ("..", "a/b", "", "../umbrella"):
        with pytest.raises(InvalidName):
            open_tenant(root, wrong, Repository.open)


def test_a_server_that_only_reads_makes_no_tenants_repository(tmp_path: Path) -> None:
    root = open_store(tmp_path / "store")
    with pytest.raises(NotFound, match="tenant acme has no repository yet"):
        open_tenant(ReadOnlyStore(root), "acme", Repository.open)
    open_tenant(root, "acme", Repository.open).close()
    open_tenant(ReadOnlyStore(root), "acme", Repository.open).close()


def test_a_tenant_that_is_slow_to_open_holds_up_no_other() -> None:
    opened, made = threading.Event(), []

    def make(name: str) -> ASGIApp:
        made.append(name)
        if name == "slow":
            assert opened.wait(20)
        return PlainTextResponse(name)

    async def go() -> None:
        apps = TenantApps(PlainTextResponse("default"), make)

        async def ask(name: str) -> None:
            scope: Any = {"type": "http", "method": "GET", "state": {"grant": Grant("x", Scope.READ, name)}}
            await apps(scope, None, lambda _: asyncio.sleep(0))  # type: ignore[arg-type]

        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(ask("slow"))
            while not made:
                await asyncio.sleep(0.01)
            await asyncio.wait_for(ask("quick"), 10)
            opened.set()

    asyncio.run(go())
    assert made == ["slow", "quick"]


# -- the engine ----------------------------------------------------------------------------------------------------


def test_an_owners_view_of_an_engine(engine: Engine) -> None:
    one, two, nobody = (OwnedEngine(engine, Owner(name, salt)) for name, salt in (("a", "x"), ("b", "y"), (None, "")))
    for view in (one, two, nobody):
        view.submit(PROMPT, SamplingParams(max_tokens=2, temperature=0), sequence_id="same").result()
    try:
        for view in (one, two, nobody):
            assert [info.id for info in view.sequences() if info.id == "same"] == ["same"]
        mine = HfPager(one, ["same"])
        assert [seq.id for seq in mine.logical_seqs()] == ["same"]
        assert set(HfPager(one).occupied_pages()) == set(mine.occupied_pages())  # no pages kept as prefix cache only
        for name in ("tenants/a/same", "tenants/b/same"):
            for act in (nobody.drop, lambda name: nobody.submit([1], sequence_id="x", resume=name)):
                with pytest.raises(NotFound):
                    act(name)
        with pytest.raises(NotFound):  # by its name in the engine, and without its salt
            engine.submit([], SamplingParams(max_tokens=1), resume="tenants/a/same")
        again = one.submit([], SamplingParams(max_tokens=2), sequence_id="more", resume="same")
        assert again.result() and again.cached_tokens > 0
        assert "x" not in repr(one.owner)
    finally:
        for view in (one, two, nobody):
            view.drop("same")
        one.drop("more")
    engine.check_integrity()
