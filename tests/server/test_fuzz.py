"""Whatever is sent, the server answers in its own form and never with a 5xx, and what it stored is whole.

The server has all that one can have: tokens, a tenant, a page that may write, and a registry of cartridges.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from starlette.applications import Starlette

from kvist.cartridge import hub
from kvist.cartridge.config import CartridgeConfig
from kvist.engines.hf import Engine, HfPager, OwnedEngine, Owner, SamplingParams
from kvist.errors import StoreError
from kvist.repo import Repository, fsck
from kvist.server import Tokenizer, create_app
from kvist.server.access import Access
from kvist.server.offer import open_offer
from kvist.server.seeing import Seeing
from kvist.server.tenants import open_tenant
from kvist.server.tokens import Scope, Tokens, add_token
from kvist.store import MemoryStore

from .conftest import running
from .fuzzing import KNOWN, Request, Requests
from .test_cartridges import trained

_PATIENCE_S = 60
CALLERS = {
    "read": (Scope.READ, None),
    "write": (Scope.WRITE, None),
    "admin": (Scope.ADMIN, None),
    "acme": (Scope.WRITE, "acme"),
}


class Target:
    """A server with tokens and a tenant, what is behind it, and what it answered."""

    def __init__(self, url: str, texts: dict[str, str], engine: Engine, repos: list[Repository]) -> None:
        self.http = httpx2.Client(base_url=url, timeout=_PATIENCE_S)
        self.texts, self.engine, self.repos = texts, engine, repos
        self.statuses: Counter[int] = Counter()
        self.answered: Counter[str] = Counter()
        self.errors = 0
        self.known: list[str] = ["main"]

    def bearer(self, caller: str) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.texts[caller]}"}

    def send(self, request: Request) -> httpx2.Response:
        for number in range(10):  # half of them whole, half cut short
            name = self.known[-1 - number // 2 % len(self.known)]
            name = name if number % 2 else name[: len(name) // 2]
            request.path = request.path.replace(f"{KNOWN}{number}", name)
            request.body = request.body and request.body.replace(f"{KNOWN}{number}".encode(), name.encode())
        headers = (self.bearer(request.caller) if request.caller in self.texts else {}) | request.headers
        got = self.http.request(
            request.method, httpx2.URL(request.path).copy_merge_params(request.query), content=request.body,
            headers=headers,
        )  # fmt: skip
        self.statuses[got.status_code] += 1
        self.answered[f"{request.method} {request.route}"] += got.status_code == 200
        return got

    def check(self, number: int, request: Request) -> None:
        """Send one request; what comes back must be an answer or an error in our form."""
        try:
            got = self.send(request)
        except (httpx2.InvalidURL, httpx2.LocalProtocolError, httpx2.UnsupportedProtocol, ValueError):
            return  # no HTTP client can send that
        except httpx2.TimeoutException:
            pytest.fail(f"no answer to request {number}: {request}")
        if got.status_code == 503 and request.route == "/v1/kvist/cartridges":
            assert got.json()["error"]["code"] == "store", (number, request, got.text)  # one that it names
        else:
            assert got.status_code < 500, (number, request, got.text)
        if got.status_code >= 400 and request.method != "HEAD":
            self.check_form(got)
            self.errors += 1
        assert not any(text in got.text for text in self.texts.values())
        assert "server" not in got.headers
        if (
            got.status_code == 200
            and request.method != "HEAD"
            and got.headers.get("content-type") == "application/json"
        ):
            document = got.json()
            if isinstance(document, dict):
                self.known += [found for name in ("cid", "id") if isinstance(found := document.get(name), str)]

    def check_form(self, got: httpx2.Response) -> None:
        """An error is OpenAI's envelope, or a page that tells of it, or uvicorn's of what is no HTTP."""
        kind = got.headers["content-type"].partition(";")[0]
        if kind == "application/json":
            assert set(got.json()["error"]) == {"message", "type", "param", "code"}
        elif kind == "text/html":
            assert 'role="alert"' in got.text
        else:
            assert (got.status_code, got.text) == (400, "Invalid HTTP request received.")


@contextlib.contextmanager
def fuzzed(engine: Engine, model_dir: Path, directory: Path) -> Iterator[Target]:
    path, store, repos = directory / "tokens.json", MemoryStore(), []
    seeing = Seeing(may_write=True)
    trained(engine, 8, 1, "first").save_pretrained(directory / "first")
    registry = {"registry": str(directory / "registry.db"), "cache_dir": str(directory / "cache")}
    offer = open_offer(engine, CartridgeConfig.from_extra(registry))
    texts = {name: add_token(path, name, who[0], tenant=who[1]) for name, who in CALLERS.items()}

    def app_of(tenant: str | None, repo: Repository) -> Starlette:
        repos.append(repo)
        view = OwnedEngine(engine, Owner(tenant, repo.config.block_salt))
        return create_app(
            view, repo, pager=HfPager, params=SamplingParams, tokenizer=Tokenizer.load(model_dir), offer=offer,
            seeing=seeing if tenant is None else seeing.of_tenant(),
        )  # fmt: skip

    default = app_of(None, Repository.open(store, create=True))
    app = seeing.guarded(
        default, lambda name: app_of(name, open_tenant(store, name, Repository.open)), Access(Tokens(path))
    )
    with running(app) as url:
        target = Target(url, texts, engine, repos)
        with target.http:
            yield target
    assert offer.library is not None
    offer.library.close()
    for repo in repos:
        repo.close()


def fuzz(engine: Engine, model_dir: Path, directory: Path, count: int) -> None:
    with fuzzed(engine, model_dir, directory) as target:
        described = target.send(Request("GET", "/openapi.json", caller="admin")).json()
        models = [each["id"] for each in target.http.get("/v1/models", headers=target.bearer("read")).json()["data"]]
        usual = {
            "model": models,
            "role": ["user", "assistant", "system"],
            "path": [str(directory / "first"), str(directory), "/", "/a\0b", "/" + "x" * 5_000],
            "store": ["memory:", "/a\0b", "file:///a%00b", "file:///" + "y" * 5_000, "nonsense://x", "s3://"],
            "hub": ["org/name", "x" * 500, "/a\0b", str(directory / "first")],
        }
        requests = Requests(described, [*CALLERS, "", "acme", "write", "admin"], seed=7, usual=usual)
        for caller in ("admin", "acme"):
            body = b'{"prompt": [5, 6, 7, 8], "max_tokens": 2, "ignore_eos": true}'
            assert target.send(Request("POST", "/v1/completions", body=body, caller=caller)).status_code == 200
            body = b'{"branch": "main"}'
            assert target.send(Request("POST", "/v1/processfork/snapshot", body=body, caller=caller)).status_code == 200
        body = json.dumps({"path": str(directory / "first")}).encode()
        assert target.send(Request("POST", "/v1/kvist/cartridges", body=body, caller="admin")).status_code == 200
        for number in range(count):
            target.check(number, requests.draw())
        print(f"\n{sum(target.statuses.values())} requests: {dict(sorted(target.statuses.items()))}")
        print(f"answered with 200: {dict(target.answered.most_common(20))}")
        assert target.errors > count / 10
        for route in ("completions", "chat/completions", "processfork/snapshot", "processfork/checkout"):
            assert target.answered[f"POST /v1/{route}"] > count / 1_000, route
        assert target.answered["POST /v1/processfork/fork"]
        for repo in target.repos:
            report = fsck.check(repo)
            assert report.is_clean, report
        engine.check_integrity()


@pytest.fixture
def small(load, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:  # type: ignore[no-untyped-def]
    """Sequences are short, so that a request is no work; and no hub is asked for anything."""

    def nothing(*_: object) -> Path:
        raise StoreError("the hub is out of reach")

    monkeypatch.setattr(hub, "_download", nothing)
    with load(pages=512, max_model_len=40) as engine:
        yield engine


def test_a_thousand_requests(small: Engine, model_dir: Path, tmp_path: Path) -> None:
    fuzz(small, model_dir, tmp_path, 1_500)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_thousand_requests(small: Engine, model_dir: Path, tmp_path: Path) -> None:
    fuzz(small, model_dir, tmp_path, 20_000)
