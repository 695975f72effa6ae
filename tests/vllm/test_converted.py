"""Snapshots converted from the embedded engine to vLLM and back: what goes on from them has the logprobs of a prefill.

Bits are not equal, since other kernels made the pages. How far apart they are is bounded, and that a wrong page is far
outside of that bound is shown beside it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvist.engines.hf import Engine, HfPager, SamplingParams, StepOutput
from kvist.pager import capture, convert, restore
from kvist.repo import LogicalSeq, Repository
from kvist.testing.answers import Step
from kvist.testing.scenario.requests import CHECKOUT, GREEDY, Case, Past, error_of, interrupt, prompt
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
    path = model("tiny", dtype="float32", family=family)
    file = path / "model.safetensors"
    tensors = load_file(file)
    biases = sorted(name for name in tensors if name.endswith("_proj.bias"))
    generator = torch.Generator().manual_seed(7)
    for name in biases:  # as made they are zeros, and Qwen2 would be Llama
        tensors[name] = 0.5 * torch.randn(tensors[name].shape, generator=generator)
    assert bool(biases) == (family == "qwen2")
    if biases:
        save_file(tensors, file, {"format": "pt"})
    return path


@pytest.fixture(scope="module")
def url(family: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return (tmp_path_factory.mktemp(f"kv-{family}") / "store").as_uri()


@pytest.fixture(scope="module")
def vllm(weights: Path, url: str, start: Callable[..., VllmServer]) -> Iterator[VllmServer]:
    server = start(weights, url, dtype="float32")
    yield server
    server.stop()


@pytest.fixture
def embedded() -> Iterator[Callable[[Path], Engine]]:
    engines: list[Engine] = []

    def load(weights: Path) -> Engine:
        engines.append(Engine.load(weights, pages=128, page_size_tokens=16).start())
        return engines[-1]

    yield load
    for engine in engines:
        engine.close()


GUIDE = (Path(__file__).parents[2] / "docs" / "guides" / "convert.md").read_text()


def blocks(language: str) -> str:
    """What the guide has in blocks of a language."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL))


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
    made = []
    for manifest in repo.manifests(rev):
        pages = list(manifest.pages)
        pages[2], pages[4] = replace(pages[2], k=pages[4].k), replace(pages[4], k=pages[2].k)
        made.append(replace(manifest, pages=tuple(pages)))
    return repo.commit(made, parents=[repo.resolve(rev)], branch=branch).cid


def pages_of(repo: Repository, rev: str) -> list[tuple[str, str]]:
    """Digests of the pages of its only sequence, in token order."""
    (manifest,) = repo.manifests(rev)
    (seq,) = manifest.sequences
    pages = {page.ix: (page.k, page.v) for page in manifest.pages}
    return [pages[ix] for ix in seq.page_ixs]


def story_of(engine: Engine, url: str, seed: int) -> LogicalSeq:
    """A sequence of the embedded engine, as it is on the branch ``story``."""
    engine.submit(prompt(300, seed), replace(PARAMS, max_tokens=20), sequence_id="story").result()
    with Repository.open(url, create=True) as repo:
        cid = capture(HfPager(engine, ["story"]), repo).snapshot.cid
        repo.branch("story", cid, move=True)
        (seq,) = repo.manifests(cid)[0].sequences
        return seq


def require_vllm_goes_on(server: VllmServer, ids: list[int], cid: str, wrong: str) -> str:
    """What goes on from ``cid`` is near a prefill, and what does from ``wrong`` is not; in words."""
    asked = {"max_tokens": STEPS, **GREEDY}
    prefill = server.complete(ids, cache_salt="prefill", **asked)
    assert prefill.cached_tokens == 0
    found, missed = (server.resume(rev, "story", **asked) for rev in (cid, wrong))
    assert found.cached_tokens == missed.cached_tokens == len(ids) - 1
    near, far = (first(tops_of(prefill.steps), tops_of(got.steps)) for got in (found, missed))
    assert near < NEAR < FAR < far
    assert found.token_ids == prefill.token_ids and apart(tops_of(found.steps), tops_of(prefill.steps)) < NEAR
    return f"{near:.1e} from a prefill, {far:.1e} with two pages misplaced"


def require_embedded_goes_on(engine: Engine, fresh: Engine, url: str, past: Past) -> str:
    """What goes on from a snapshot of vLLM's, converted, is near a prefill, and with misplaced pages it is not."""
    with Repository.open(url) as repo:
        done = convert.apply(repo, convert.plan(repo, past.cid, [engine.layout], branch=f"to/{past.case.name}"))
        wrong = misplace(repo, done.cid, f"wrong/{past.case.name}")
        restored = restore(HfPager(engine), repo, done.cid)
        assert restored.tokens == past.tokens - 1 and not restored.same_numerics
        restore(HfPager(engine), repo, wrong, rename="wrong/{}".format)
    (name,) = restored.sequences
    requests = [engine.submit([], PARAMS, resume=rev) for rev in (name, f"wrong/{name}")]
    requests.append(fresh.submit(past.token_ids, PARAMS))
    found, missed, prefill = (request.result() for request in requests)
    assert [request.cached_tokens for request in requests] == [past.tokens - 1, past.tokens - 1, 0]
    near, far = (first(tops_of(prefill), tops_of(got)) for got in (found, missed))
    assert near < NEAR < FAR < far
    assert [step.token_id for step in found] == [step.token_id for step in prefill]
    assert apart(tops_of(prefill), tops_of(found)) < NEAR
    return f"{near:.1e} from a prefill, {far:.1e} with two pages misplaced"


def test_from_the_embedded_engine_to_vllm(
    family: str,
    weights: Path,
    url: str,
    vllm: VllmServer,
    embedded: Callable[[Path], Engine],
    note: Callable[[str], None],
) -> None:
    ids = list(story_of(embedded(weights), url, 1).token_ids)
    refused = vllm.http.post(CHECKOUT, json={"cid": "story"})
    message = error_of(refused, 409, "layout_mismatch")
    assert "page_size_tokens 16 there, 32 here" in message and "memory_order 'LNHD' there" in message
    assert "kvist convert REV --to-layout FILE" in refused.text

    cid = kvist(url, "convert", "story", "--to-layout", "-", "-q", stdin=vllm.http.get(LAYOUT).text)
    with Repository.open(url) as repo:
        wrong = misplace(repo, cid, "wrong")
    answer = vllm.post(CHECKOUT, {"cid": cid})
    assert answer["restored_tokens"] == len(ids) - 1 == 319
    assert not answer["bit_exact"] and answer["differences"]["converted"]["engine"] is None
    assert answer["differences"]["engine"] == {"snapshot": "kvist.engines.hf", "engine": "vllm"}
    unnamed = vllm.complete(ids, max_tokens=1, **GREEDY)
    assert unnamed.cached_tokens == len(ids) - 1, "found by its tokens"
    note(f"{family}: embedded to vLLM: {require_vllm_goes_on(vllm, ids, cid, wrong)}")


def test_from_vllm_to_the_embedded_engine(
    family: str,
    weights: Path,
    url: str,
    vllm: VllmServer,
    embedded: Callable[[Path], Engine],
    note: Callable[[str], None],
) -> None:
    past = interrupt(vllm, Case("tale", prompt(300, 2), GREEDY))
    told = require_embedded_goes_on(embedded(weights), embedded(weights), url, past)
    note(f"{family}: vLLM to embedded: {told}")


def test_there_and_back_goes_on_bit_for_bit(
    weights: Path, url: str, vllm: VllmServer, embedded: Callable[[Path], Engine]
) -> None:
    """Converted and converted back, its pages are the first engine's own again: not a bit is lost on the way."""
    past = interrupt(vllm, Case("both", prompt(300, 3), GREEDY))
    with Repository.open(url) as repo:
        there = convert.apply(repo, convert.plan(repo, past.cid, [embedded(weights).layout], branch="there"))
        kvist(url, "convert", there.cid, "--like", past.cid, "--as", "back")
        whole = (past.tokens - 1) // 32
        assert pages_of(repo, "back")[:whole] == pages_of(repo, past.cid)[:whole]
    got = vllm.resume("back", past.sequence, max_tokens=STEPS, **GREEDY)
    assert got.cached_tokens == past.tokens - 1
    assert got.steps == past.next_steps(STEPS)


def test_the_guide(
    weights: Path, url: str, vllm: VllmServer, embedded: Callable[[Path], Engine], tmp_path: Path
) -> None:
    """Its commands and its code run, in order."""
    story_of(embedded(weights), url, 4)
    (tmp_path / "kvist").write_text(f'#!/bin/sh\nexec {sys.executable} -m kvist "$@"\n')
    (tmp_path / "kvist").chmod(0o755)
    done = subprocess.run(
        ["bash", "-euxo", "pipefail", "-c", blocks("sh")],
        cwd=tmp_path,
        env=os.environ | {"U": vllm.url, "KVIST_STORE": url, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert '"bit_exact":false' in done.stdout and '"cached_tokens":319' in done.stdout
    said = re.sub(r"\b[0-9a-f]{12}\b", "CID", done.stdout)
    for line in blocks("text").splitlines():
        assert re.sub(r"\b[0-9a-f]{12}\b", "CID", line) in said, line
    exec(compile(blocks("python"), "convert.md", "exec"), {"STORE": url})


def test_to_two_ranks_and_back(
    model: Callable[..., Path],
    store: str,
    start: Callable[..., VllmServer],
    embedded: Callable[[Path], Engine],
    note: Callable[[str], None],
) -> None:
    """Heads are dealt out to vLLM's tensor-parallel ranks, and put together again."""
    weights = model("tiny", dtype="float32")
    binding = {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}
    server = start(weights, store, "--tensor-parallel-size", "2", dtype="float32", env=binding)
    ids = list(story_of(embedded(weights), store, 5).token_ids)
    cid = kvist(store, "convert", "story", "--to-layout", "-", "-q", stdin=server.http.get(LAYOUT).text)
    with Repository.open(store) as repo:
        assert [manifest.layout.n_heads for manifest in repo.manifests(cid)] == [2, 2]
        wrong = misplace(repo, cid, "wrong")
    note(f"embedded to two ranks of vLLM: {require_vllm_goes_on(server, ids, cid, wrong)}")
    past = interrupt(server, Case("ranks", prompt(300, 6), GREEDY))
    server.kill()
    note(
        f"two ranks of vLLM to embedded: {require_embedded_goes_on(embedded(weights), embedded(weights), store, past)}"
    )
