"""The page in a real browser: Debian's Chromium, by way of Playwright. Writes the pictures of docs/screenshots.

``KVIST_CHROMIUM`` names the browser; else ``chromium`` on the path. ``KVIST_SCREENSHOTS`` is a directory for pictures;
by default they are thrown away.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.applications import Starlette

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.repo import Repository
from kvist.server import create_app
from kvist.server.access import Access, Guard
from kvist.server.seeing import Seeing
from kvist.server.ui.app import create_ui
from kvist.store import open_store
from kvist.store.recorded import RecordedStore
from server.conftest import running

from .sample import fill

playwright = pytest.importorskip("playwright.sync_api", reason="needs playwright", exc_type=ImportError)
CHROMIUM = os.environ.get("KVIST_CHROMIUM") or shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium: apt-get install chromium, or KVIST_CHROMIUM")

SNAPSHOTS = 200
Serve = Callable[..., str]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 snapshots with forks, merges and tags."""
    path = tmp_path_factory.mktemp("page") / "conversations"
    with Repository.open(str(path), create=True) as repo:
        fill(repo, SNAPSHOTS)
    return path


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of agents that fork, for the hit curves."""
    path = tmp_path_factory.mktemp("trace") / "agents.jsonl"
    kvist(path.parent, "sim", "generate", "agents", "--out", str(path))
    return path


@pytest.fixture(scope="module")
def shots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("KVIST_SCREENSHOTS")
    return Path(named) if named else tmp_path_factory.mktemp("shots")


@pytest.fixture
def serve() -> Iterator[Serve]:
    """Starts a real server, and gives its url."""
    with ExitStack() as stack:

        def start(app: Starlette, seeing: Seeing) -> str:
            stack.enter_context(seeing.recording())
            return stack.enter_context(running(seeing.metered(Guard(app, Access()), app.routes)))

        yield start


class Visit:
    """One tab. Whatever it complains of, or asks of anybody else, fails the test."""

    def __init__(self, browser: Any, url: str, **settings: Any) -> None:
        self.url = url
        self.context = browser.new_context(viewport={"width": 1360, "height": 900}, **settings)
        self.context.set_default_timeout(0)
        self.page = self.context.new_page()
        self.complaints: list[str] = []
        self.page.on("console", lambda said: self.complaints.append(f"{said.type}: {said.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on("request", self._on_request)

    def _on_request(self, request: Any) -> None:
        if not request.url.startswith(self.url):
            self.complaints.append(f"a request to {request.url}")

    def go(self, path: str) -> Any:
        self.page.goto(self.url + path)
        return self.page

    def end(self) -> None:
        self.context.close()
        assert self.complaints == []


@pytest.fixture
def visit(chromium: Any) -> Iterator[Callable[..., Visit]]:
    visits: list[Visit] = []

    def open(url: str, **settings: Any) -> Visit:
        visits.append(Visit(chromium, url, **settings))
        return visits[-1]

    yield open
    for one in visits:
        one.end()


def kvist(store: Path, *words: str) -> Any:
    """What the command line says, as JSON."""
    command = [sys.executable, "-m", "kvist", "--store", str(store), "--json", *words]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def test_the_lineage_of_200_snapshots(store: Path, serve: Serve, visit: Callable[..., Visit], shots: Path) -> None:
    with Repository.open(str(store)) as repo:
        seeing = Seeing()
        url = serve(create_ui(repo, seeing), seeing)
        known = repo.log()
        tab = visit(url, color_scheme="light")
        page = tab.go("/ui/lineage")
        assert page.locator(".lanes circle").count() == len(known) == SNAPSHOTS
        edges = sum(len(snapshot.parents) for snapshot in known)
        assert page.locator(".lanes path").count() >= edges
        assert any(len(snapshot.parents) > 1 for snapshot in known)
        assert page.locator(".chip.tag").count() > 0
        assert page.locator(".chip.branch").count() > 5
        page.screenshot(path=shots / "lineage-light.png")
        # the rows meet: a graph with gaps is no graph
        boxes = page.locator(".log .lanes").evaluate_all("all => all.map(one => one.getBoundingClientRect().toJSON())")
        assert all(abs(one["bottom"] - two["top"]) < 1 for one, two in itertools.pairwise(boxes))


def test_a_fork_made_by_a_click_is_seen_by_the_command_line(
    store: Path, serve: Serve, visit: Callable[..., Visit], shots: Path
) -> None:
    with Repository.open(str(store)) as repo:
        seeing = Seeing(may_write=True)
        url = serve(create_ui(repo, seeing), seeing)
        page = visit(url, color_scheme="light").go("/")
        page.locator(".log a").first.click()
        page.get_by_label("Fork as").fill("clicked")
        page.get_by_label("branches").fill("3")
        page.get_by_role("button", name="Fork").click()
        page.wait_for_url("**/ui/snapshots/*note=*")
        assert "clicked/0, clicked/1, clicked/2" in page.get_by_role("status").inner_text()
        cid = page.locator("dl.pairs dd.mono").first.inner_text()
        assert page.locator("dl.pairs").get_by_text("clicked/2").count() == 1  # a child of it
        page.screenshot(path=shots / "snapshot-light.png", full_page=True)
    branches = {one["name"]: one["cid"] for one in kvist(store, "branch")["refs"]}
    for number in range(3):
        shown = kvist(store, "show", branches[f"clicked/{number}"])
        assert shown["parents"] == [cid]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_light_and_dark(
    scheme: str, store: Path, trace: Path, serve: Serve, visit: Callable[..., Visit], shots: Path
) -> None:
    """By the browser's wish, and by the switch; text stands out from its paper in both."""
    with Repository.open(RecordedStore(open_store(str(store)))) as repo:
        seeing = Seeing()
        url = serve(create_ui(repo, seeing, trace=trace), seeing)
        tab = visit(url, color_scheme=scheme)
        page = tab.go("/")
        while page.get_by_text("Being counted").count() or not page.locator("#curves polyline").count():
            page = tab.go("/")
        assert is_dark(page) == (scheme == "dark")
        assert contrast(page) > 7
        page.screenshot(path=shots / f"page-{scheme}.png", full_page=True)
        other = "light" if scheme == "dark" else "dark"
        page.get_by_role("button", name=other).click()
        page.wait_for_selector(f"html[data-theme={other}]")
        assert is_dark(page) == (other == "dark")
        assert contrast(page) > 7
        page.get_by_role("button", name="auto").click()
        page.wait_for_selector("html:not([data-theme])")
        assert is_dark(page) == (scheme == "dark")


def luminance(page: Any, name: str) -> float:
    text: str = page.evaluate(f"getComputedStyle(document.body).{name}")
    channels = [float(part) / 255 for part in text[text.index("(") + 1 : -1].replace(",", " ").split()[:3]]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def is_dark(page: Any) -> bool:
    return luminance(page, "backgroundColor") < 0.2


def contrast(page: Any) -> float:
    low, high = sorted((luminance(page, "backgroundColor"), luminance(page, "color")))
    return (high + 0.05) / (low + 0.05)


def test_keyboard_order(store: Path, serve: Serve, visit: Callable[..., Visit]) -> None:
    """Tab goes from the way past the head, by the head, to the content, in the order in which they are seen."""
    with Repository.open(str(store)) as repo:
        seeing = Seeing(may_write=True)
        url = serve(create_ui(repo, seeing), seeing)
        page = visit(url).go("/ui/snapshots/main")
        seen = []
        for _ in range(40):
            page.keyboard.press("Tab")
            seen.append(page.evaluate("document.activeElement.innerText || document.activeElement.name"))
        assert seen[:5] == ["to the content", "kvist", "auto", "light", "dark"]
        order = [seen.index(name) for name in ("lineage", "name", "n", "Fork", "Tag")]
        assert order == sorted(order)
        page.goto(url + "/")
        page.keyboard.press("Tab")
        page.keyboard.press("Enter")
        page.wait_for_url(url + "/#content")


def with_engine(engine: Engine, repo: Repository, serve: Serve) -> str:
    """`kvist serve --allow-write`; its url."""
    seeing = Seeing(may_write=True)
    app = create_app(engine, repo, pager=HfPager, params=SamplingParams, seeing=seeing)
    seeing.watch(app.state.page, repo, engine)
    return serve(app, seeing)


def test_without_javascript(engine: Engine, tmp_path: Path, serve: Serve, visit: Callable[..., Visit]) -> None:
    """All is seen, and all is done, by pages and forms alone."""
    with Repository.open(str(tmp_path / "plain"), create=True) as repo:
        url = with_engine(engine, repo, serve)
        with httpx2.Client(base_url=url, timeout=None) as http:
            answer = http.post("/v1/completions", json={"prompt": [*range(10, 74)], "max_tokens": 6}).json()
            body = {"request_id": answer["id"], "branch": "main"}
            assert http.post("/v1/processfork/snapshot", json=body).status_code == 200
        page = visit(url, java_script_enabled=False).go("/")
        while page.get_by_text("Being counted").count():
            page.reload()
        for panel in ("#lineage .log circle", "#space table", "#tiers .bar rect", "#requests table"):
            assert page.locator(panel).first.is_visible(), panel
        page.locator("#lineage .log a").first.click()
        page.get_by_label("Tag as").fill("by-hand")
        page.get_by_role("button", name="Tag").click()
        assert "Tagged: by-hand" in page.get_by_role("status").inner_text()
        page.get_by_label("Fork as").fill("by-hand")
        page.get_by_role("button", name="Fork").click()
        assert "by-hand/0" in page.get_by_role("status").inner_text()
        page.get_by_role("button", name="Check out").click()
        assert "Checked out" in page.get_by_role("status").inner_text()
        page.get_by_role("button", name="dark").click()
        assert page.locator("html").get_attribute("data-theme") == "dark"


def test_small_screens(store: Path, serve: Serve, visit: Callable[..., Visit]) -> None:
    """Nothing but tables of their own scrolls sideways."""
    with Repository.open(str(store)) as repo:
        seeing = Seeing()
        tab = visit(serve(create_ui(repo, seeing), seeing))
        tab.page.set_viewport_size({"width": 420, "height": 800})
        for path in ("/", "/ui/lineage", "/ui/snapshots/main"):
            page = tab.go(path)
            assert page.evaluate("document.documentElement.scrollWidth - innerWidth") <= 0, path


def test_it_is_live(engine: Engine, tmp_path: Path, serve: Serve, visit: Callable[..., Visit], shots: Path) -> None:
    """With an engine: requests, their cached tokens and curves come by themselves; check out by a click."""
    with Repository.open(str(tmp_path / "live"), create=True) as repo:
        url = with_engine(engine, repo, serve)
        tab = visit(url, color_scheme="dark")
        page = tab.go("/")
        assert "No request yet" in page.locator("#requests").inner_text()
        with httpx2.Client(base_url=url, timeout=None) as http:
            prompts = [[(7 * n + k) % 400 + 10 for n in range(64 + 32 * k)] for k in range(4)]
            for number in range(24):
                ids = [*prompts[number % 4], *range(number + 10, number + 30)]
                answer = http.post("/v1/completions", json={"prompt": ids, "max_tokens": 6}).json()
                if number % 6 == 5:
                    body = {"request_id": answer["id"], "branch": "main", "message": f"turn {number}"}
                    cid = http.post("/v1/processfork/snapshot", json=body).json()["cid"]
                    http.post("/v1/processfork/fork", json={"cid": cid, "n": 2, "name": f"try-{number}"})
            snapshot = {"kv_transfer_params": {"snapshot": cid}, "max_tokens": 4}
            assert http.post("/v1/completions", json=snapshot).status_code == 200
        page.wait_for_selector("#requests table")  # taken over by the refresh, without a reload
        page.wait_for_selector("#lineage .log circle")
        while not page.locator("#curves polyline").count():
            page = tab.go("/")
        assert "from cache" in page.locator("#tiles").inner_text()
        assert page.locator("#tiers .bar rect").count() > 0
        page.screenshot(path=shots / "engine-dark.png", full_page=True)
        page.goto(f"{url}/ui/snapshots/{cid}")
        page.get_by_role("button", name="Check out").click()
        assert "Checked out" in page.get_by_role("status").inner_text()
    engine.clear_prefix_cache()
