"""Metrics: of a real server over real HTTP, and the parts of which they are made."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route
from starlette.testclient import TestClient

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.repo import Repository
from kvist.server import create_app
from kvist.server.access import Access, Guard
from kvist.server.metrics import Metered, Metrics, Sample, families
from kvist.server.seeing import Seeing
from kvist.store import MemoryStore, MeteredStore
from kvist.store.recorded import RecordedStore
from kvist.telemetry import operation

from .conftest import running

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def read(text: str) -> Samples:
    """Every sample; each metric is told of once."""
    found: Samples = {}
    seen: set[str] = set()
    for family in text_string_to_metric_families(text):
        assert family.name not in seen, f"{family.name} is there twice"
        seen.add(family.name)
        for sample in family.samples:
            found[sample.name, tuple(sorted(sample.labels.items()))] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


class Seen:
    """A server that is watched, as `kvist serve` puts it together."""

    def __init__(self, http: httpx2.Client, store: MeteredStore) -> None:
        self.http, self.store = http, store

    def samples(self) -> Samples:
        answer = self.http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith("text/plain")
        return read(answer.text)


@pytest.fixture
def seen(engine: Engine) -> Iterator[Seen]:
    seeing = Seeing()
    store = MeteredStore(MemoryStore())
    with Repository.open(RecordedStore(store), create=True) as repo, seeing.recording():
        app = create_app(engine, repo, pager=HfPager, params=SamplingParams, seeing=seeing)
        seeing.watch(app.state.page, repo, engine)
        with (
            running(seeing.metered(Guard(app, Access()), app.routes)) as url,
            httpx2.Client(base_url=url, timeout=None) as http,
        ):
            yield Seen(http, store)


def test_what_a_server_does_is_counted(seen: Seen) -> None:
    prompt = [(7 * n) % 400 + 10 for n in range(40)]
    for _ in range(2):
        answer = seen.http.post("/v1/completions", json={"prompt": prompt, "max_tokens": 4})
        assert answer.status_code == 200, answer.text
    usage = answer.json()["usage"]
    cid = seen.http.post("/v1/processfork/snapshot", json={"branch": "main"}).json()["cid"]
    seen.http.post("/v1/processfork/fork", json={"cid": cid, "n": 2})
    seen.http.post("/v1/processfork/checkout", json={"cid": cid})
    assert seen.http.post("/v1/processfork/checkout", json={"cid": "nothing"}).status_code == 404
    samples = seen.samples()
    for name in ("snapshot", "fork", "checkout", "put_pages"):
        assert value(samples, "kvist_operation_seconds_count", operation=name) == 1
    assert value(samples, "kvist_operation_bytes_total", operation="put_pages") > 0
    assert value(samples, "kvist_operation_pages_total", operation="snapshot") > 0
    assert value(samples, "kvist_http_requests_total", method="POST", route="/v1/completions", status="200") == 2
    route = "/v1/processfork/checkout"
    assert value(samples, "kvist_http_requests_total", method="POST", route=route, status="404") == 1
    assert value(samples, "kvist_http_request_seconds_count", method="POST", route=route) == 2
    assert value(samples, "kvist_http_requests_in_flight") == 1  # this very one
    assert value(samples, "kvist_tokens_total", kind="prompt") == 80
    assert value(samples, "kvist_tokens_total", kind="cached") >= usage["prompt_tokens_details"]["cached_tokens"] > 0
    assert value(samples, "kvist_tokens_total", kind="generated") == 8
    assert value(samples, "kvist_store_call_seconds_count", call="put_many") > 0
    assert value(samples, "kvist_store_bytes_total", call="writer") > 0
    pages = [value(samples, "kvist_pool_pages", state=state) for state in ("held", "pinned", "cached", "free")]
    assert sum(pages) == 512
    assert value(samples, "kvist_engine_running") == 0
    assert ("kvist_cartridge_hits_total", ()) in samples
    assert any(name == "kvist_build_info" for name, _ in samples)
    assert any(name == "process_resident_memory_bytes" for name, _ in samples)


def test_scrapes_list_no_store(seen: Seen) -> None:
    """The repository is counted at a bounded rate, not at each scrape."""
    name = ("kvist_repository_snapshots", ())
    while name not in (samples := seen.samples()):
        pass
    assert samples[name] == 0
    assert value(samples, "kvist_repository_whole") == 1
    assert value(samples, "kvist_repository_refs", kind="branch") == 0
    before = seen.store.traffic()
    ages = [value(seen.samples(), "kvist_repository_age_seconds") for _ in range(20)]
    assert seen.store.traffic() == before
    assert ages == sorted(ages)


def test_openmetrics_for_who_asks(seen: Seen) -> None:
    answer = seen.http.get("/metrics", headers={"Accept": "application/openmetrics-text; version=1.0.0"})
    assert answer.headers["content-type"].startswith("application/openmetrics-text")
    assert answer.text.endswith("# EOF\n")


def test_what_somebody_types_is_no_label() -> None:
    async def answer(request: Request) -> Response:
        return PlainTextResponse("x")

    metrics = Metrics()
    app = Starlette(routes=[Route("/things/{name:path}", answer, methods=["GET"])])
    client = TestClient(Metered(app, metrics, app.routes, prefix="/below"))
    for number in range(5):
        assert client.get(f"/things/{number}").status_code == 200
        assert client.get(f"/nothing/{number}").status_code == 404
        client.request(f"METHOD{number}", "/things/a")
    samples = read(TestClient(Starlette(routes=[Route("/m", metrics.endpoint)])).get("/m").text)
    labels = {tuple(labels) for name, labels in samples if name == "kvist_http_requests_total"}
    assert labels == {
        (("method", "GET"), ("route", "/below/things/{name:path}"), ("status", "200")),
        (("method", "GET"), ("route", "(other)"), ("status", "404")),
        (("method", "(other)"), ("route", "/below/things/{name:path}"), ("status", "405")),
    }


def test_an_application_that_breaks_is_counted() -> None:
    async def broken(request: Request) -> Response:
        raise ZeroDivisionError

    metrics = Metrics()
    app = Starlette(routes=[Route("/", broken)])
    client = TestClient(Metered(app, metrics, app.routes), raise_server_exceptions=False)
    assert client.get("/").status_code == 500
    samples = read(TestClient(Starlette(routes=[Route("/m", metrics.endpoint)])).get("/m").text)
    assert value(samples, "kvist_http_requests_total", method="GET", route="/", status="500") == 1
    assert value(samples, "kvist_http_requests_in_flight") == 0


def test_failures_by_kind() -> None:
    metrics = Metrics()
    with metrics.recording(), pytest.raises(ZeroDivisionError), operation("gc"):
        raise ZeroDivisionError
    found = {metric.name: metric for metric in metrics.registry.collect()}
    (failure,) = [one for one in found["kvist_operation_failures"].samples if one.name.endswith("_total")]
    assert failure.labels == {"operation": "gc", "kind": "internal"}


def test_samples_of_one_metric_are_told_together() -> None:
    made = list(
        families(
            [
                Sample("kvist_x", "x", 1, {"kind": "a"}),
                Sample("kvist_y_total", "y", 2),
                Sample("kvist_x", "x", 3, {"kind": "b"}),
            ]
        )
    )
    assert [(metric.name, metric.type, len(metric.samples)) for metric in made] == [
        ("kvist_x", "gauge", 2),
        ("kvist_y", "counter", 1),
    ]
