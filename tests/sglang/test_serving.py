"""What only SGLang does, on servers of it: other schedules, latent attention, penalties, its own routes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sglang_servers import needs_server, serve

from kvist.testing.models import make_shape
from kvist.testing.scenario.requests import (
    CHECKOUT,
    GREEDY,
    SEEDED,
    SNAPSHOT,
    STATS,
    Case,
    Past,
    assert_same,
    check_out,
    go_on,
    interrupt,
    prompt,
)
from kvist.testing.scenario.store import without_pages
from kvist.testing.sglang import SglangServer

pytestmark = [needs_server, pytest.mark.timeout(1800)]

# Not both: in which order SGLang adds the one and multiplies by the other is another in each process.
PENALIZED = SEEDED | {"frequency_penalty": 0.6}
REPEATING = SEEDED | {"repetition_penalty": 1.2}
CASES = [
    Case("greedy", prompt(150, seed=1), GREEDY),
    Case("seeded", prompt(200, seed=2), SEEDED),
    Case("penalized", prompt(90, seed=3), PENALIZED),
    Case("repeating", prompt(80, seed=6), REPEATING),
    Case("lost", prompt(65, seed=5), GREEDY),
    Case("held", prompt(70, seed=4), GREEDY | {"ignore_eos": False, "min_tokens": 120}),
]


@dataclass(frozen=True)
class Schedule:
    """One way to run SGLang.

    Attributes:
        name: of it.
        shape: of the model.
        options: of its command line.
        page_size: tokens of a page.
    """

    name: str
    shape: str
    options: tuple[str, ...]
    page_size: int

    def start(self, root: Path) -> SglangServer:
        model = root / "model"
        if not model.exists():
            make_shape(model, self.shape)
            if self.shape == "latent":
                _stretch(model / "config.json")
        store = (root / "store").as_uri()
        return serve(model, store, *self.options, page_size=self.page_size, deterministic=True)


def _stretch(config: Path) -> None:
    """SGLang's CPU path for latent attention takes positions as DeepSeek's own models scale them, and no others."""
    said = json.loads(config.read_text())
    theta = said.get("rope_parameters", {}).get("rope_theta", 10000.0)
    said["rope_parameters"] = {"rope_type": "yarn", "rope_theta": theta, "factor": 2.0, "beta_fast": 32, "beta_slow": 1}
    said["rope_parameters"] |= {"original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0}
    said["moe_layer_freq"] = 1
    config.write_text(json.dumps(said))


SCHEDULES = [
    Schedule("in turn, in chunks", "tiny", ("--disable-overlap-schedule", "--chunked-prefill-size", "64"), 64),
    Schedule("latent", "latent", (), 16),
]


@pytest.fixture(scope="module", params=SCHEDULES, ids=lambda schedule: schedule.name)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    chosen: Schedule = request.param
    return chosen


@pytest.fixture(scope="module")
def root(schedule: Schedule, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("sglang")


@pytest.fixture(scope="module")
def pasts(schedule: Schedule, root: Path) -> dict[str, Past]:
    """What the first server was asked, before its SIGKILL."""
    server = schedule.start(root)
    found = {case.name: interrupt(server, case) for case in CASES}
    server.kill()
    return found


@pytest.fixture(scope="module")
def fresh(pasts: dict[str, Past], schedule: Schedule, root: Path) -> Iterator[SglangServer]:
    """The second server, on the first one's store."""
    server = schedule.start(root)
    yield server
    server.kill()


@pytest.mark.parametrize("name", [case.name for case in CASES if case.name != "lost"])
def test_goes_on_bit_for_bit(name: str, pasts: dict[str, Past], fresh: SglangServer) -> None:
    """Penalties, and the least of tokens, count what was generated before the snapshot."""
    before = pasts[name]
    check_out(fresh, before)
    got = go_on(fresh, before, 120)
    count = min(40, len(before.whole.steps) - before.sampled)  # one of them ends by itself
    assert_same(got.steps[:count], before.next_steps(count))
    assert got.cached_tokens == before.tokens - 1


def test_its_layout(schedule: Schedule, pasts: dict[str, Past], fresh: SglangServer) -> None:
    layout = fresh.get(f"/v1/processfork/snapshots/{pasts['greedy'].cid}")["layout"]
    attention = "mla" if schedule.shape == "latent" else "full"
    assert (layout["attention"], layout["page_size_tokens"]) == (attention, schedule.page_size)


def test_by_its_tokens_on_its_own_route(pasts: dict[str, Past], fresh: SglangServer) -> None:
    """``/generate`` names nothing, and finds what was checked out."""
    before = pasts["greedy"]
    check_out(fresh, before)
    params = {"temperature": 0.0, "max_new_tokens": 20, "ignore_eos": True}
    answer = fresh.post("/generate", {"input_ids": before.token_ids, "sampling_params": params})
    assert answer["output_ids"] == [step.token_id for step in before.next_steps(20)]
    assert answer["meta_info"]["cached_tokens"] == before.tokens - 1


def test_in_a_chat(pasts: dict[str, Past], fresh: SglangServer) -> None:
    """A snapshot is named there too, and the ids of what is to be added are given."""
    before = pasts["greedy"]
    body: dict[str, Any] = {"kv_transfer_params": before.named, "max_tokens": 8, "temperature": 0.0}
    got = fresh.post("/v1/chat/completions", body)
    assert got["usage"]["prompt_tokens"] == before.tokens
    assert got["usage"]["prompt_tokens_details"]["cached_tokens"] == before.tokens - 1
    said = {"messages": [{"role": "user", "content": "hello"}], **body}
    assert fresh.http.post("/v1/chat/completions", json=said).status_code == 400


def test_a_salt_keeps_apart(pasts: dict[str, Past], fresh: SglangServer) -> None:
    """What was made without one is not told to those who bring one; who begins as it goes on from its whole pages."""
    before = pasts["seeded"]
    check_out(fresh, before)
    got = fresh.complete(before.token_ids, max_tokens=3, cache_salt="another", **SEEDED)
    assert got.cached_tokens == 0
    page = fresh.get(f"/v1/processfork/snapshots/{before.cid}")["layout"]["page_size_tokens"]
    other = [*before.token_ids[: page + 1], 5, 6, 7]
    assert fresh.complete(other, max_tokens=3, **SEEDED).cached_tokens >= page, "but its beginning is the snapshot's"


def test_hung_up_before_its_pages_came(pasts: dict[str, Past], fresh: SglangServer) -> None:
    """Nothing of it is left, and nobody waits for it."""
    before = pasts["penalized"]
    check_out(fresh, before)
    for _ in range(3):
        fresh.stream(None, kv_transfer_params=before.named, max_tokens=500, **PENALIZED).close()
    got = go_on(fresh, before, 40)
    assert_same(got.steps, before.next_steps(40))


def test_pages_that_are_lost_after_the_checkout(pasts: dict[str, Past], fresh: SglangServer, root: Path) -> None:
    """The request ends with an error, and nothing of it was ever data; once they are back, it goes on."""
    before = pasts["lost"]
    check_out(fresh, before)
    named = {"kv_transfer_params": before.named, "max_tokens": 5, **GREEDY}
    with without_pages((root / "store").as_uri()):
        answer = fresh.http.post("/v1/completions", json=named)
        assert answer.status_code == 500
        assert "cannot be had" in answer.text
    assert_same(go_on(fresh, before, 20).steps, before.next_steps(20))


def test_names_that_begin_alike(fresh: SglangServer) -> None:
    """SGLang aborts what begins as the one that is to be aborted: so no name begins as another."""
    stays = fresh.stream(prompt(40, seed=9), name="twig2", max_tokens=150, **GREEDY)
    goes = fresh.stream(prompt(41, seed=9), name="twig", max_tokens=3000, **GREEDY)
    goes.wait(3)
    goes.close()
    assert len(stays.result().steps) == 150


def test_it_is_told_what_was_done(pasts: dict[str, Past], fresh: SglangServer) -> None:
    counted = fresh.get(STATS)
    assert counted["loads"] > 0
    assert counted["loads_failed"] == 1
    assert counted["pages_loaded"] >= counted["pages_read"] > 0


def test_the_cache_may_be_flushed(pasts: dict[str, Past], fresh: SglangServer) -> None:
    """What was checked out is loaded again; what had ended is gone."""
    ended = fresh.complete(prompt(30, seed=8), name="ended", max_tokens=3, **GREEDY)
    assert fresh.http.post("/flush_cache").status_code == 200
    assert fresh.http.post(SNAPSHOT, json={"request_id": ended.id}).status_code == 404
    before = pasts["greedy"]
    assert fresh.post(CHECKOUT, {"cid": before.cid})["ok"]
    assert go_on(fresh, before, 10).cached_tokens == before.tokens - 1


def test_other_weights_are_no_longer_these(fresh: SglangServer, root: Path) -> None:
    """Last: what was stored does not fit weights that came while SGLang ran."""
    body = {"model_path": str(root / "model"), "load_format": "auto"}
    assert fresh.http.post("/update_weights_from_disk", json=body).status_code == 200
    answer = fresh.http.post(SNAPSHOT, json={"name": "after"})
    assert answer.status_code == 503
    assert "the weights were replaced" in answer.json()["error"]["message"]
