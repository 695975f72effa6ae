"""The page over HTTP, without a browser: what it shows, what its forms do, and what it refuses."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Final

import pytest
from starlette.testclient import TestClient

from kvist.repo import RefKind, Repository, prune
from kvist.server.access import Access
from kvist.server.tokens import Scope, Tokens, add_token, remove_token

from .conftest import Open
from .sample import Maker, fill

HTML: Final = {"Accept": "text/html"}
_VOID: Final = {"meta", "link", "input", "img", "br"}


class Page(HTMLParser):
    """A document that nests, with its elements, texts and links."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.texts: list[str] = []
        self.tags: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []
        assert len(set(self.ids)) == len(self.ids)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        assert not any(name == "style" or name.startswith("on") for name in given), f"{tag}: the policy forbids {given}"
        self.tags.append(tag)
        self.ids += [name for name in (given.get("id"),) if name]
        self.links += [link for link in (given.get("href"), given.get("src"), given.get("action")) if link]
        if tag not in _VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append(data.strip())

    @property
    def text(self) -> str:
        return " ".join(self.texts)


def page(client: TestClient, path: str, status: int = 200) -> Page:
    answer = client.get(path, headers=HTML)
    assert answer.status_code == status, answer.text
    assert answer.headers["content-security-policy"].startswith("default-src 'self'")
    assert answer.headers["cache-control"] == "no-store"
    return Page(answer.text)


def whole(client: TestClient) -> Page:
    """The page, once everything was counted."""
    while "Being counted" in (found := page(client, "/")).text:
        pass
    return found


def test_every_panel_of_an_empty_repository_names_the_command_that_fills_it(repo: Repository, browse: Open) -> None:
    found = whole(browse(repo))
    assert {"tiles", "lineage", "space", "tiers", "curves", "requests"} <= set(found.ids)
    for command in ("kvist serve --model", "kvist sim generate", "ui --trace"):
        assert command in found.text


def test_lineage_is_drawn_and_linked(filled: Repository, browse: Open) -> None:
    found = whole(browse(filled))
    assert found.tags.count("circle") == 20
    assert "all 40 snapshots" in found.text
    every = page(browse(filled), "/ui/lineage")
    assert every.tags.count("circle") == 40
    for snapshot in filled.log():
        assert f"/ui/snapshots/{snapshot.cid}" in every.links
    assert "main" in every.text
    assert all(link.startswith(("/", "#")) for link in found.links + every.links)


def test_lineage_in_parts(filled: Repository, browse: Open) -> None:
    client = browse(filled)
    assert page(client, "/ui/lineage?at=30").tags.count("circle") == 10
    assert page(client, "/ui/lineage?at=4000").tags.count("circle") == 1
    for nonsense in ("-1", "x", "1e9", "9" * 99, "²"):
        assert page(client, f"/ui/lineage?at={nonsense}").tags.count("circle") == 40


def test_figures_are_the_repository_s(filled: Repository, browse: Open) -> None:
    client = browse(filled)
    found = whole(client)
    refs = list(filled.refs.all())
    assert f"snapshots {len(filled.log())}" in found.text
    assert f"branches {sum(ref.kind is RefKind.BRANCH for ref in refs)}" in found.text
    assert "Qwen/Qwen3-0.6B" in found.text


def test_shared_parts_of_parents(repo: Repository, browse: Open) -> None:
    maker = Maker(repo)
    first = maker.snapshot("main", "first", new=3)
    maker.snapshot("main", "second", new=1, parents=(first,))
    maker.fork(first, 1, "again")
    found = page(browse(repo), "/ui/lineage")
    assert "75%" in found.text
    assert "100%" in found.text
    assert "root" in found.text


def test_one_snapshot(filled: Repository, browse: Open) -> None:
    client = browse(filled)
    for snapshot in filled.log():
        found = page(client, f"/ui/snapshots/{snapshot.cid}")
        assert snapshot.cid in found.text
        for parent in snapshot.parents:
            assert f"/ui/snapshots/{parent}" in found.links
    assert page(client, "/ui/snapshots/main").text
    assert "no snapshot, branch or tag" in page(client, "/ui/snapshots/nothing", 404).text


def test_what_people_write_is_text(repo: Repository, browse: Open) -> None:
    nasty = "<script>alert('x')</script>\"'&amp;{{ 7 * 7 }}"
    made = Maker(repo).snapshot("main", nasty, new=1)
    client = browse(repo)
    for path in ("/", "/ui/lineage", f"/ui/snapshots/{made.cid}"):
        found = page(client, path)
        assert found.tags.count("script") == 1
        assert nasty in found.texts
    assert "<script>alert" not in client.get("/ui/snapshots/%3Cscript%3Ealert", headers=HTML).text


def test_pruned_and_damaged_snapshots_are_named(repo: Repository, browse: Open) -> None:
    maker = Maker(repo)
    first = maker.snapshot("main", "first", new=2)
    maker.snapshot("main", "second", new=1, parents=(first,))
    prune.apply(repo, prune.plan(repo, prune.Rules(last=1)))
    client = browse(repo)
    assert "pruned" in page(client, "/ui/lineage").text
    assert "was pruned" in page(client, f"/ui/snapshots/{first.cid}").text


# -- forms -----------------------------------------------------------------------------------------------------------


def submitted(client: TestClient, path: str, **fields: str) -> Page:
    """The page after a form that must succeed: post, redirect, get."""
    answer = client.post(path, data=fields, headers=HTML | {"Origin": "http://127.0.0.1"})
    assert answer.status_code == 303, answer.text
    return page(client, answer.headers["location"])


def test_fork_tag_and_what_is_said_of_it(filled: Repository, browse: Open) -> None:
    client = browse(filled)
    cid = filled.resolve("main")
    assert 'action="/ui/fork"' in client.get(f"/ui/snapshots/{cid}", headers=HTML).text
    found = submitted(client, "/ui/fork", cid=cid, n="2", name="mine")
    assert "Forked: mine/0, mine/1" in found.text
    assert [filled.snapshot(f"mine/{number}").parents for number in range(2)] == [(cid,), (cid,)]
    found = submitted(client, "/ui/tag", cid=cid, name="v9")
    assert "Tagged: v9" in found.text
    assert "v9" in page(client, "/").text
    assert "Forked:" in submitted(client, "/ui/fork", cid=cid).text  # a name is made


@pytest.mark.parametrize(
    ("path", "fields", "status", "text"),
    [
        ("/ui/fork", {"n": "0"}, 400, "expected a number in [1, 100]"),
        ("/ui/fork", {"n": "101"}, 400, "expected a number in [1, 100]"),
        ("/ui/fork", {"n": "²"}, 400, "expected a number in [1, 100]"),
        ("/ui/fork", {"n": "1", "name": "../x"}, 400, "invalid_name"),
        ("/ui/tag", {"name": ""}, 400, "invalid_name"),
        ("/ui/tag", {"name": "v0.1"}, 409, "already_exists"),
        ("/ui/checkout", {}, 400, "there is no engine here"),
    ],
)
def test_a_form_that_cannot_be_done_says_why(
    filled: Repository, browse: Open, path: str, fields: dict[str, str], status: int, text: str
) -> None:
    cid = filled.resolve("main")
    before = len(filled.log())
    answer = browse(filled).post(path, data={"cid": cid} | fields, headers=HTML)
    assert answer.status_code == status
    found = Page(answer.text)
    assert text in found.text
    assert cid in found.text  # the snapshot is still shown
    assert len(filled.log()) == before


def test_nothing_is_changed_unless_asked_for(filled: Repository, browse: Open) -> None:
    client = browse(filled, write=False)
    cid = filled.resolve("main")
    found = page(client, f"/ui/snapshots/{cid}")
    assert "/ui/fork" not in found.links
    assert "--allow-write" in found.text
    before = len(filled.log())
    for path in ("/ui/fork", "/ui/tag", "/ui/checkout"):
        answer = client.post(path, data={"cid": cid, "n": "1", "name": "x"})
        assert (answer.status_code, "read_only" in answer.text) == (400, True)
    assert len(filled.log()) == before


def test_another_page_s_forms_are_refused(filled: Repository, browse: Open) -> None:
    client = browse(filled)
    fields = {"cid": filled.resolve("main"), "n": "1", "name": "x"}
    for headers in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.post("/ui/fork", data=fields, headers=headers).status_code == 403
    assert client.get("/", headers={"Host": "evil.example"}).status_code == 403
    assert len(list(filled.refs.all(RefKind.BRANCH))) == len(set(filled.refs.names(RefKind.BRANCH)))


def test_large_and_odd_forms(filled: Repository, browse: Open) -> None:
    client = browse(filled)
    assert client.post("/ui/tag", content=b"x" * 20_000).status_code == 413
    for body in (b"\xff\xfe=%ff", b"a=1&" * 4000, b"cid=%00&name=%00", b"cid=" + b"%F0%9F%8C%B1" * 100):
        assert client.post("/ui/tag", content=body).status_code in (400, 404)


# -- the browser -----------------------------------------------------------------------------------------------------


def test_the_theme_is_kept(repo: Repository, browse: Open) -> None:
    client = browse(repo)
    assert "data-theme" not in client.get("/", headers=HTML).text
    answer = client.post("/ui/theme", data={"theme": "dark", "next": "/ui/lineage?at=3"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/lineage?at=3")
    assert '<html lang="en" data-theme="dark">' in client.get("/", headers=HTML).text
    client.post("/ui/theme", data={"theme": "nonsense"})
    assert 'data-theme="dark"' in client.get("/", headers=HTML).text
    client.post("/ui/theme", data={"theme": "auto"})
    assert "data-theme" not in client.get("/", headers=HTML).text


@pytest.mark.parametrize("there", ["//evil.example", "https://evil.example", "/\\evil.example", "evil", "", "/\r\nx"])
def test_nobody_is_sent_elsewhere(repo: Repository, browse: Open, there: str) -> None:
    answer = browse(repo).post("/ui/theme", data={"theme": "dark", "next": there})
    assert answer.headers["location"] == "/"


def test_files_and_icon(repo: Repository, browse: Open) -> None:
    client = browse(repo)
    for name, kind in (("kvist.css", "text/css"), ("kvist.js", "text/javascript"), ("favicon.svg", "image/svg+xml")):
        answer = client.get(f"/ui/static/{name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kind)
        again = client.get(f"/ui/static/{name}", headers={"If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
    assert client.get("/favicon.ico").status_code == client.get("/favicon.svg").status_code == 200
    for name in ("nothing", "..%2Fviews.py", "..", "%2e%2e%2fviews.py"):
        assert client.get(f"/ui/static/{name}").status_code == 404


def test_the_page_s_own_files_reach_nobody_else() -> None:
    """No outside request: neither files nor templates name another server."""
    home = Path(__file__).parents[3] / "src" / "kvist" / "server" / "ui"
    for file in [*home.glob("templates/*"), *home.glob("static/*")]:
        text = file.read_text().replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"https?://|//[a-z]+\.[a-z]|@import|url\(", text), file.name
    assert (home / "static" / "kvist.js").read_text().count("\n") < 100


def test_log_in_and_out(filled: Repository, browse: Open, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    reader, writer = add_token(file, "reader", Scope.READ), add_token(file, "writer", Scope.WRITE)
    client = browse(filled, access=Access(Tokens(file)))
    answer = client.get("/ui/lineage?at=3", headers=HTML)
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/login?next=%2Fui%2Flineage%3Fat%3D3")
    form = client.get(answer.headers["location"], headers=HTML)
    assert form.status_code == 200
    assert filled.store.url not in form.text
    answer = client.post("/ui/login", data={"token": "kvist_wrong", "next": "/"})
    assert answer.status_code == 401
    assert not answer.cookies
    answer = client.post("/ui/login", data={"token": reader, "next": "/ui/lineage?at=3"})
    assert (answer.status_code, answer.headers["location"]) == (303, "/ui/lineage?at=3")
    set_cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in set_cookie and "samesite=strict" in set_cookie
    assert reader.lower() not in set_cookie  # a browser sends its cookies to every port of the host
    word = answer.headers["set-cookie"].partition(";")[0]
    cid = filled.resolve("main")
    found = page(client, f"/ui/snapshots/{cid}")
    assert "/ui/fork" not in found.links  # it may read
    assert client.post("/ui/tag", data={"cid": cid, "name": "x"}).status_code == 403
    client.post("/ui/login", data={"token": writer, "next": "/"})
    assert "/ui/fork" in page(client, f"/ui/snapshots/{cid}").links
    assert "Tagged: x" in submitted(client, "/ui/tag", cid=cid, name="x").text
    assert client.post("/ui/logout").status_code == 303
    assert client.get("/", headers=HTML).status_code == 303
    reads = HTML | {"Cookie": word}
    assert client.get("/", headers=reads).status_code == 200  # another browser's
    remove_token(file, "reader")
    assert client.get("/", headers=reads).status_code == 303


def test_a_word_counts_until_its_browser_logs_out(filled: Repository, browse: Open, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    text = add_token(file, "reader", Scope.READ)
    client = browse(filled, access=Access(Tokens(file)))
    word = client.post("/ui/login", data={"token": text}).headers["set-cookie"].partition(";")[0]
    client.cookies.clear()
    for beside in ({}, {"Authorization": "Basic eDp5"}, {"Cookie": f'json={{"a":1}}; a b{{}}=1; {word}; x'}):
        for path in ("/", "/metrics"):  # which the page links to
            assert client.get(path, headers=HTML | {"Cookie": word} | beside).status_code == 200, (path, beside)
    assert client.get("/version", headers={"Cookie": word}).status_code == 401  # the page's alone
    assert client.get("/", headers={"Cookie": word, "Authorization": "Bearer wrong"}).status_code == 401
    assert client.post("/ui/logout", headers={"Cookie": word}).status_code == 303
    assert client.get("/", headers=HTML | {"Cookie": word}).status_code == 303


def test_metrics_are_linked_where_they_may_be_seen(filled: Repository, browse: Open, tmp_path: Path) -> None:
    file = tmp_path / "tokens.json"
    texts = [add_token(file, name, Scope.READ, tenant=name if name == "acme" else None) for name in ("all", "acme")]
    client = browse(filled, access=Access(Tokens(file)))
    links = [Page(client.get("/", headers={"Authorization": f"Bearer {text}"}).text).links for text in texts]
    assert ["/metrics" in each for each in links] == [True, False]


def test_a_store_that_fails_is_told_of(repo: Repository, browse: Open, tmp_path: Path) -> None:
    made = Maker(repo).snapshot("main", "first", new=1)
    client = browse(repo)
    assert made.cid[7:19] in page(client, "/").text
    record = tmp_path / "conversations" / "refs" / "branches" / "main.ref"
    record.write_bytes(b"{}")
    while "damaged_object" not in (found := page(client, "/")).text:
        pass
    assert made.cid[7:19] in found.text  # as it was known before


def test_curves_of_a_trace(repo: Repository, browse: Open, tmp_path: Path) -> None:
    pytest.importorskip("numpy", reason="needs the extra sim")
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        "".join(
            f'{{"timestamp": {n}, "input_length": 1024, "output_length": 1, "hash_ids": [1, {n % 3 + 2}]}}\n'
            for n in range(12)
        )
    )
    client = browse(repo, trace=trace)
    while "12 prompts" not in (found := page(client, "/")).text:
        assert "error" not in found.ids
    assert {"lru", "arc", "s3fifo", "sieve", "ceiling"} <= set(found.texts)
    assert found.tags.count("polyline") == 5


def test_many_snapshots_show_on_one_page(repo: Repository, browse: Open) -> None:
    fill(repo, 60)
    assert page(browse(repo), "/ui/lineage").tags.count("circle") == 60
