"""`ConvertScenario`: snapshots converted from the embedded engine to the live one, and back.

Bits are not equal, since other kernels made the pages. How far apart they are is bounded, by the log probabilities of a
full prefill in the engine that goes on; and that a wrong page is far outside of that bound is shown beside it.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final

import pytest

from kvist.pager import LogicalSeq, capture, convert, restore
from kvist.repo import Repository
from kvist.testing.answers import Step
from kvist.testing.live import LiveServer
from kvist.testing.models import make_shape
from kvist.testing.scenario.base import LiveScenario, Start
from kvist.testing.scenario.requests import CHECKOUT, GREEDY, Case, Past, error_of, interrupt, prompt

if TYPE_CHECKING:
    from kvist.engines.hf import Engine, StepOutput

LAYOUT: Final = "/v1/processfork/layout"
NEAR: Final = 1e-3
"""Most nats that a log probability may differ from that of a full prefill."""
FAR: Final = 1e-2
"""Least that it differs with two pages in each other's place."""
STEPS: Final = 8

Tops = list[dict[int | str, float]]
"""Log probabilities of the likeliest tokens, step after step."""


class ConvertScenario(LiveScenario):
    """What goes on from a converted snapshot is what a prefill says, but for the last bits.

    `serve` must serve in float32: in half precision, the engines' own rounding is past the bound.

    Attributes:
        family: of the models, see `kvist.testing.models.FAMILIES`.
        other_page_size: tokens a page of the embedded engine; not that of the live one.
    """

    family: ClassVar[str] = "llama"
    other_page_size: ClassVar[int] = 16

    @classmethod
    def make_model(cls, directory: Path, *, seed: int = 0) -> Path:
        """Make a model of the family, in float32."""
        path = make_shape(directory, "tiny", dtype="float32", family=cls.family, seed=seed)
        if cls.family == "qwen2":
            _draw_biases(path / "model.safetensors")
        return path

    @pytest.fixture(scope="class")
    @classmethod
    def server(cls, store: str, start: Start) -> LiveServer:
        """The live engine."""
        return start(store)

    @pytest.fixture
    def embedded(self, model: Path) -> Iterator[Callable[[], Engine]]:
        """Makes embedded engines of the same model, started."""
        from kvist.engines.hf import Engine

        engines: list[Engine] = []

        def load() -> Engine:
            engines.append(
                Engine.load(model, pages=2048 // self.other_page_size, page_size_tokens=self.other_page_size)
            )
            return engines[-1].start()

        yield load
        for engine in engines:
            engine.close()

    # -- scenarios -----------------------------------------------------------------------------------------------

    def test_from_the_embedded_engine(self, server: LiveServer, store: str, embedded: Callable[[], Engine]) -> None:
        """Refused with the two layouts side by side and the command; converted by it; near a prefill."""
        ids = list(story_of(embedded(), store, 1).token_ids)
        refused = server.http.post(CHECKOUT, json={"cid": "story"})
        message = error_of(refused, 409, "layout_mismatch")
        assert f"page_size_tokens {self.other_page_size} there, {self.page_size} here" in message
        assert "kvist convert REV --to-layout FILE" in refused.text
        cid = kvist(store, "convert", "story", "--to-layout", "-", "-q", stdin=server.http.get(LAYOUT).text)
        with Repository.open(store) as repo:
            wrong = misplace(repo, cid, "wrong")
        answer = server.post(CHECKOUT, {"cid": cid})
        assert answer["restored_tokens"] == len(ids) - 1
        assert not answer["bit_exact"] and answer["differences"]["converted"]["engine"] is None
        assert answer["differences"]["engine"]["snapshot"] == "kvist.engines.hf"
        self.require_near(server, ids, (cid, wrong, "story"), "from the embedded engine")

    def test_to_the_embedded_engine(self, server: LiveServer, store: str, embedded: Callable[[], Engine]) -> None:
        """A request that was snapshotted while it ran goes on in the embedded engine, near a prefill there."""
        from kvist.engines.hf import HfPager, SamplingParams

        past: Past = interrupt(server, Case("tale", prompt(300, 2), GREEDY))
        engine, fresh = embedded(), embedded()
        with Repository.open(store) as repo:
            done = convert.apply(repo, convert.plan(repo, past.cid, [engine.layout], branch="tale"))
            wrong = misplace(repo, done.cid, "wrong-tale")
            restored = restore(HfPager(engine), repo, done.cid)
            assert restored.tokens == past.tokens - 1 and not restored.same_numerics
            restore(HfPager(engine), repo, wrong, rename="wrong/{}".format)
        (name,) = restored.sequences
        params = SamplingParams(max_tokens=STEPS, ignore_eos=True, logprobs=5)
        requests = [engine.submit([], params, resume=rev) for rev in (name, f"wrong/{name}")]
        requests.append(fresh.submit(past.token_ids, params))
        found, missed, prefill = (request.result() for request in requests)
        assert [request.cached_tokens for request in requests] == [past.tokens - 1, past.tokens - 1, 0]
        self._judge("to the embedded engine", prefill, found, missed)

    def test_there_and_back(self, server: LiveServer, store: str, embedded: Callable[[], Engine]) -> None:
        """Converted and converted back, pages are the live engine's own again: it goes on bit for bit."""
        past = interrupt(server, Case("both", prompt(300, 3), GREEDY))
        with Repository.open(store) as repo:
            there = convert.apply(repo, convert.plan(repo, past.cid, [embedded().layout], branch="there"))
            kvist(store, "convert", there.cid, "--like", past.cid, "--as", "back")
            whole = (past.tokens - 1) // self.page_size
            assert pages_of(repo, "back")[:whole] == pages_of(repo, past.cid)[:whole]
        got = server.resume("back", past.sequence, max_tokens=STEPS, **GREEDY)
        assert got.cached_tokens == past.tokens - 1
        assert got.steps == past.next_steps(STEPS)

    @classmethod
    def require_near(cls, server: LiveServer, ids: list[int], revs: tuple[str, str, str], way: str) -> None:
        """What goes on in the live engine from a snapshot is near a prefill, and with misplaced pages it is not.

        Args:
            server: the live engine.
            ids: of the sequence.
            revs: the converted snapshot, the same with misplaced pages, and the sequence's name in both.
            way: where it came from, for the note.
        """
        right, wrong, sequence = revs
        asked: dict[str, Any] = {"max_tokens": STEPS, **GREEDY}
        found, missed = (server.resume(rev, sequence, **asked) for rev in (right, wrong))
        assert found.cached_tokens == missed.cached_tokens == len(ids) - 1
        prefill = server.complete(ids, cache_salt="prefill", **asked)
        assert prefill.cached_tokens == 0
        cls._judge(way, prefill.steps, found.steps, missed.steps)

    @classmethod
    def _judge(
        cls,
        way: str,
        prefill: Sequence[Step | StepOutput],
        found: Sequence[Step | StepOutput],
        missed: Sequence[Step | StepOutput],
    ) -> None:
        near, far = (apart(tops_of(prefill)[:1], tops_of(got)[:1]) for got in (found, missed))
        cls.note(f"{cls.family}, {way}: {near:.1e} from a prefill, {far:.1e} with two pages misplaced")
        assert near < NEAR < FAR < far
        assert [step.token_id for step in found] == [step.token_id for step in prefill]
        assert apart(tops_of(prefill), tops_of(found)) < NEAR


# -- what it does ------------------------------------------------------------------------------------------------


def story_of(engine: Engine, store: str, seed: int) -> LogicalSeq:
    """A sequence of 320 tokens that the embedded engine made, as it is on the branch ``story``."""
    from kvist.engines.hf import HfPager, SamplingParams

    engine.submit(prompt(300, seed), SamplingParams(max_tokens=20, ignore_eos=True), sequence_id="story").result()
    with Repository.open(store, create=True) as repo:
        cid = capture(HfPager(engine, ["story"]), repo).snapshot.cid
        repo.branch("story", cid, move=True)
        (seq,) = repo.manifests(cid)[0].sequences
        return seq


def kvist(store: str, *words: str, stdin: str = "") -> str:
    """Run the command line; what it prints."""
    command = [sys.executable, "-m", "kvist", "--store", store, *words]
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def misplace(repo: Repository, rev: str, branch: str) -> str:
    """The same snapshot with the K of two pages of each rank in each other's place."""
    made = []
    for manifest in repo.manifests(rev):
        pages = list(manifest.pages)
        a, b = len(pages) // 4, len(pages) // 2
        pages[a], pages[b] = dataclasses.replace(pages[a], k=pages[b].k), dataclasses.replace(pages[b], k=pages[a].k)
        made.append(dataclasses.replace(manifest, pages=tuple(pages)))
    return repo.commit(made, parents=[repo.resolve(rev)], branch=branch).cid


def pages_of(repo: Repository, rev: str) -> list[tuple[tuple[str, str], ...]]:
    """Digests of the pages of its only sequence, in token order: K and V on each rank."""
    tables = []
    for manifest in repo.manifests(rev):
        (seq,) = manifest.sequences
        pages = {page.ix: (page.k, page.v) for page in manifest.pages}
        tables.append([pages[ix] for ix in seq.page_ixs])
    return list(zip(*tables, strict=True))


def tops_of(steps: Sequence[Step | StepOutput]) -> Tops:
    """The log probabilities that come with each step."""
    return [dict(step.top) for step in steps]


def apart(one: Tops, other: Tops) -> float:
    """The largest difference of a log probability that both tell, up to the step at which their tokens part."""
    found = 0.0
    for a, b in zip(one, other, strict=True):
        common = a.keys() & b.keys()
        found = max(found, *(abs(a[token] - b[token]) for token in common)) if common else float("inf")
        if max(a, key=a.__getitem__) != max(b, key=b.__getitem__):
            break
    return found


def _draw_biases(file: Path) -> None:
    """Give the projections biases: as made they are zeros, and Qwen2 would be Llama."""
    import torch
    from safetensors.torch import load_file, save_file

    tensors, generator = load_file(file), torch.Generator().manual_seed(7)
    for name in sorted(name for name in tensors if name.endswith("_proj.bias")):
        tensors[name] = 0.5 * torch.randn(tensors[name].shape, generator=generator)
    save_file(tensors, file, {"format": "pt"})
