"""Snapshots converted from the embedded engine to vLLM and back: what goes on from them has the logprobs of a prefill.

Bits are not equal, since other kernels made the pages. How far apart they are is bounded, and that a wrong page is far
outside of that bound is shown beside it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvist.engines.hf import Engine, HfPager, SamplingParams, StepOutput
from kvist.pager import capture, convert, restore
from kvist.repo import Repository
from kvist.testing.answers import Step
from kvist.testing.scenario.requests import CHECKOUT, GREEDY, Case, interrupt, prompt
from kvist.testing.vllm import VllmServer

LAYOUT = "/v1/processfork/layout"
NEAR = 1e-3
"""Most that a logprob may differ from that of a full prefill in the engine that goes on."""
FAR = 1e-2
"""Least that it differs with two pages in each other's place."""
STEPS = 8
PARAMS = SamplingParams(max_tokens=STEPS, ignore_eos=True, logprobs=5)

Tops = list[dict[int, float]]
"""Logprobs of the likeliest tokens, by token, step after step."""


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def weights(family: str, model: Callable[..., Path]) -> Path:
    return model("tiny", dtype="float32", family=family)


@pytest.fixture(scope="module")
def url(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return (tmp_path_factory.mktemp(f"kv-{family}") / "store").as_uri()


@pytest.fixture(scope="module")
def vllm(weights: Path, url: str, start: Callable[..., VllmServer]) -> Iterator[VllmServer]:
    server = start(weights, url, dtype="float32")
    yield server
    server.stop()


@pytest.fixture
def embedded(weights: Path) -> Iterator[Callable[[], Engine]]:
    engines: list[Engine] = []

    def load() -> Engine:
        engines.append(Engine.load(weights, pages=128, page_size_tokens=16).start())
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


def kvist(url: str, *words: str, stdin: str = "") -> str:
    """Run the command line; what it prints."""
    done = subprocess.run(
        [sys.executable, "-m", "kvist", "--store", url, *words],
        env=os.environ,
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tops_of(steps: Sequence[Step] | Sequence[StepOutput]) -> Tops:
    return [{int(token): logprob for token, logprob in step.top} for step in steps]


def apart(one: Tops, other: Tops) -> float:
    """The largest difference of a logprob that both tell, in the steps before their tokens part."""
    found = 0.0
    for a, b in zip(one, other, strict=True):
        common = a.keys() & b.keys()
        assert common, "they have no likely token in common"
        found = max(found, *(abs(a[token] - b[token]) for token in common))
        if max(a, key=a.__getitem__) != max(b, key=b.__getitem__):
            break
    return found


def first(one: Tops, other: Tops) -> float:
    return apart(one[:1], other[:1])


def misplace(repo: Repository, rev: str, branch: str) -> str:
    """The same snapshot, with the K of its third page and of its fifth in each other's place."""
    (manifest,) = repo.manifests(rev)
    pages = list(manifest.pages)
    pages[2], pages[4] = replace(pages[2], k=pages[4].k), replace(pages[4], k=pages[2].k)
    return repo.commit([replace(manifest, pages=tuple(pages))], parents=[repo.resolve(rev)], branch=branch).cid


def pages_of(repo: Repository, rev: str) -> list[tuple[str, str]]:
    """Digests of the pages of its only sequence, in token order."""
    (manifest,) = repo.manifests(rev)
    (seq,) = manifest.sequences
    pages = {page.ix: (page.k, page.v) for page in manifest.pages}
    return [pages[ix] for ix in seq.page_ixs]


def test_from_the_embedded_engine_to_vllm(
    family: str,
    url: str,
    vllm: VllmServer,
    embedded: Callable[[], Engine],
    note: Callable[[str], None],
) -> None:
    engine = embedded()
    engine.submit(prompt(300, 1), replace(PARAMS, max_tokens=20), sequence_id="story").result()
    with Repository.open(url, create=True) as repo:
        there = capture(HfPager(engine, ["story"]), repo, branch="story").snapshot
        (seq,) = repo.manifests(there.cid)[0].sequences
    refused = vllm.http.post(CHECKOUT, json={"cid": "story"})
    assert refused.status_code == 409
    error = refused.json()["error"]
    assert "page_size_tokens 16 there, 32 here" in error["message"] and "memory_order 'LNHD' there" in error["message"]
    assert "kvist convert REV --to-layout FILE" in refused.text

    cid = kvist(url, "convert", "story", "--to-layout", "-", "-q", stdin=vllm.http.get(LAYOUT).text)
    with Repository.open(url) as repo:
        wrong = misplace(repo, cid, "wrong")
    answer = vllm.post(CHECKOUT, {"cid": cid})
    assert answer["restored_tokens"] == len(seq.token_ids) - 1 == 319
    assert not answer["bit_exact"]
    assert answer["differences"]["converted"]["engine"] is None and answer["differences"]["engine"] == {
        "snapshot": "kvist.engines.hf",
        "engine": "vllm",
    }
    ids, asked = list(seq.token_ids), {"max_tokens": STEPS, **GREEDY}
    prefill = vllm.complete(ids, cache_salt="prefill", **asked)
    assert prefill.cached_tokens == 0
    found = vllm.complete(ids, **asked)
    assert found.cached_tokens == vllm.resume(cid, "story", **asked).cached_tokens == len(ids) - 1
    missed = vllm.resume(wrong, "story", **asked)
    assert missed.cached_tokens == len(ids) - 1
    near, far = (first(tops_of(prefill.steps), tops_of(got.steps)) for got in (found, missed))
    assert near < NEAR < FAR < far
    assert found.token_ids == prefill.token_ids and apart(tops_of(found.steps), tops_of(prefill.steps)) < NEAR
    note(f"{family}: embedded to vLLM: {near:.1e} from a prefill, {far:.1e} with two pages misplaced")


def test_from_vllm_to_the_embedded_engine(
    family: str, url: str, vllm: VllmServer, embedded: Callable[[], Engine], note: Callable[[str], None]
) -> None:
    past = interrupt(vllm, Case("tale", prompt(300, 2), GREEDY))
    engine, fresh = embedded(), embedded()
    with Repository.open(url) as repo:
        plan = convert.plan(repo, past.cid, [engine.layout], branch="tale")
        done = convert.apply(repo, plan)
        wrong = misplace(repo, done.cid, "wrong-tale")
        restored = restore(HfPager(engine), repo, done.cid)
        assert restored.tokens == past.tokens - 1 and not restored.same_numerics
        restore(HfPager(engine), repo, wrong, rename="wrong/{}".format)
    (name,) = restored.sequences

    def go_on(**how: Any) -> tuple[Tops, list[int], int]:
        request = engine.submit([], PARAMS, **how)
        steps = request.result()
        return tops_of(steps), [step.token_id for step in steps], request.cached_tokens

    prefill = fresh.submit(past.token_ids, PARAMS)
    steps = prefill.result()
    assert prefill.cached_tokens == 0
    found, tokens, cached = go_on(resume=name)
    missed, _, _ = go_on(resume=f"wrong/{name}")
    assert cached == past.tokens - 1
    near, far = first(tops_of(steps), found), first(tops_of(steps), missed)
    assert near < NEAR < FAR < far
    assert tokens == [step.token_id for step in steps] and apart(tops_of(steps), found) < NEAR
    note(f"{family}: vLLM to embedded: {near:.1e} from a prefill, {far:.1e} with two pages misplaced")


def test_there_and_back_goes_on_bit_for_bit(url: str, vllm: VllmServer, embedded: Callable[[], Engine]) -> None:
    """Converted and converted back, its pages are the first engine's own again: not a bit is lost on the way."""
    past = interrupt(vllm, Case("both", prompt(300, 3), GREEDY))
    with Repository.open(url) as repo:
        there = convert.apply(repo, convert.plan(repo, past.cid, [embedded().layout], branch="there"))
        kvist(url, "convert", there.cid, "--like", past.cid, "--as", "back")
        whole = (past.tokens - 1) // 32
        assert pages_of(repo, "back")[:whole] == pages_of(repo, past.cid)[:whole]
    got = vllm.resume("back", past.sequence, max_tokens=STEPS, **GREEDY)
    assert got.cached_tokens == past.tokens - 1
    assert got.steps == past.next_steps(STEPS)
