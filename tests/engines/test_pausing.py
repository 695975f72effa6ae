"""Pauses of several threads: each has the tables to itself, and the engine goes on in between."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from itertools import count, pairwise

import numpy as np
import pytest

from kvist.engines.hf import Engine, HfPager
from kvist.errors import EngineError, PoolExhausted
from kvist.pager import capture, restore
from kvist.repo import Repository
from kvist.store import MemoryStore

from .driving import page_bytes, params, prompt, run

Load = Callable[..., Engine]


def test_a_pause_keeps_other_threads_out(load: Load) -> None:
    engine = load()
    run(engine, prompt(40), 1, sequence_id="there")
    acts: dict[str, Callable[[], object]] = {
        "allocate": lambda: HfPager(engine).allocate_pages(2),
        "drop": lambda: engine.drop("there"),
        "pause": lambda: (engine.pause(), engine.resume()),
        "fork": lambda: engine.submit([], params(1), resume="there"),
    }
    for name, act in acts.items():
        if name == "fork":
            run(engine, prompt(40), 1, sequence_id="there")
        done = threading.Event()
        engine.pause()
        before = engine.stats()
        thread = threading.Thread(target=lambda act=act, done=done: (act(), done.set()))
        thread.start()
        assert not done.wait(0.05), name
        assert engine.stats() == before
        engine.resume()
        assert done.wait(10), name
        thread.join()


def test_a_new_prompt_does_not_wait_for_a_pause(load: Load) -> None:
    """A server's event loop submits; it must not stand still while somebody captures."""
    engine = load()
    engine.pause()
    requests = []
    thread = threading.Thread(target=lambda: requests.append(engine.submit(prompt(5), params(2))))
    thread.start()
    thread.join(10)
    assert len(requests) == 1
    engine.resume()
    assert len(requests[0].result()) == 2


def test_only_the_thread_that_paused_can_resume(load: Load) -> None:
    engine = load()
    caught: list[Exception] = []

    def meddle() -> None:
        try:
            engine.resume()
        except EngineError as error:
            caught.append(error)

    engine.pause()
    thread = threading.Thread(target=meddle)
    thread.start()
    thread.join()
    assert "by this thread" in str(caught[0])
    engine.resume()


def test_closing_waits_for_whoever_has_paused(load: Load) -> None:
    engine = load()
    request = engine.submit(prompt(20), params(400))
    next(iter(request))
    engine.pause()
    thread = threading.Thread(target=engine.close)
    thread.start()
    thread.join(0.05)
    assert thread.is_alive()
    assert [info.status for info in engine.sequences()] == ["running"]
    engine.resume()
    thread.join(10)
    with pytest.raises(EngineError, match="closed"):
        request.result()


def test_between_two_pauses_the_engine_gets_a_step(load: Load) -> None:
    """However many threads pause without end."""
    engine = load()
    request = engine.submit(prompt(20), params(400))
    steps: list[int] = []

    def pause_again() -> None:
        for _ in range(15):
            engine.pause()
            steps.append(engine.scheduler.steps)
            engine.resume()

    threads = [threading.Thread(target=pause_again) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(steps) == 45
    assert all(later > earlier for earlier, later in pairwise(steps[1:]))
    request.cancel()


def test_captures_and_restores_of_two_threads_over_a_nearly_full_pool(load: Load) -> None:
    """Every page of every snapshot is what its ids make it, whoever was evicted and overwritten meanwhile."""
    engine, source, repo = load(pages=26), load(pages=64), Repository.init(MemoryStore())
    for n in range(6):
        run(source, prompt(80 + n, seed=20 + n), 8, sequence_id=f"s{n}")
    cids = [capture(HfPager(source), repo, sequences=[f"s{n}"], parents=[]).snapshot.cid for n in range(6)]
    stop = threading.Event()
    failures: list[BaseException] = []

    def stream(worker: int) -> None:
        for n in range(1000):
            if stop.is_set():
                return
            engine.submit(prompt(20 + 7 * (n % 5), seed=n % 7), params(6), sequence_id=f"w{worker}-{n}").result()

    def move(worker: int) -> None:
        for n in range(20):
            names = count()
            with contextlib.suppress(PoolExhausted):
                restore(
                    HfPager(engine),
                    repo,
                    cids[(5 * n + worker) % 6],
                    rename=lambda _, n=n, names=names: f"r{worker}-{n}-{next(names)}",
                )
            cids.append(capture(HfPager(engine), repo, parents=[], message=f"{worker}-{n}").snapshot.cid)
            engine.check_integrity()

    def guarded(work: Callable[[int], None], worker: int) -> None:
        try:
            work(worker)
        except BaseException as error:
            failures.append(error)

    streams = [threading.Thread(target=guarded, args=(stream, n)) for n in range(2)]
    movers = [threading.Thread(target=guarded, args=(move, n)) for n in range(2)]
    for thread in [*streams, *movers]:
        thread.start()
    for thread in movers:
        thread.join(120)
    stop.set()
    for thread in streams:
        thread.join(30)
    assert not failures
    assert engine.stats()["evictions"] > 0
    engine.check_integrity()
    _check_snapshots(load(pages=256), repo, cids)


def _check_snapshots(fresh: Engine, repo: Repository, cids: list[str]) -> None:
    """Against pages that a roomy engine computes from the same ids; and one block is one page everywhere."""
    layout, known, checked = fresh.layout, {}, 0
    size, shape = layout.page_size_tokens, (2, layout.n_layers, layout.page_size_tokens, -1)
    for cid in cids:
        for manifest in (repo.manifest(name) for name in repo.snapshot(cid).manifests):
            pages = {page.ix: page for page in manifest.pages}
            for page in manifest.pages:
                if page.block is not None:
                    assert known.setdefault(page.block, (page.k, page.v)) == (page.k, page.v)
            for seq in manifest.sequences:
                cached = seq.cached_tokens(size)
                if not cached:
                    continue
                fresh.submit(seq.token_ids[:cached], params(0), sequence_id="again").result()
                for number, (ix, expected) in enumerate(zip(seq.page_ixs, page_bytes(fresh, "again"), strict=True)):
                    halves = [memoryview(bytearray(layout.page_bytes)) for _ in range(2)]
                    repo.get_pages([pages[ix].k, pages[ix].v], halves)
                    rows = min(size, cached - number * size)
                    stored = np.frombuffer(b"".join(halves), np.uint8).reshape(shape)[:, :, :rows]
                    assert np.array_equal(stored, np.frombuffer(expected, np.uint8).reshape(shape)[:, :, :rows])
                    checked += 1
    assert checked > 100
