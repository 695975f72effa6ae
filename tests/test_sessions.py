"""What a session costs: figures of a long one on the embedded engine, counted in bytes and pages, not in time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.engines.hf import Engine, HfPager, SamplingParams
from kvist.pager import capture, restore
from kvist.repo import Repository
from kvist.store import LocalStore, MeteredStore
from kvist.testing.models import make_model

PROMPT = [3 + (i * i * 31 + i * 17) % 500 for i in range(3950)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    model = make_model(tmp_path_factory.mktemp("model"), layers=2, hidden=64, heads=4, kv_heads=4, head_dim=64)
    with Engine.load(model, pages=600) as engine:
        yield engine


def generate(engine: Engine, prompt: list[int], tokens: int, **options: str) -> list[int]:
    params = SamplingParams(max_tokens=tokens, temperature=1.0, seed=3, ignore_eos=True)
    return [step.token_id for step in engine.submit(prompt, params, **options)]


def test_two_snapshots_of_a_session_of_4000_tokens_50_apart(engine: Engine, tmp_path: Path) -> None:
    store = MeteredStore(LocalStore(tmp_path / "store"))
    repo = Repository.init(store)
    generate(engine, PROMPT, 51, sequence_id="session")
    store.reset()
    first = capture(HfPager(engine, ["session"]), repo, branch="session")
    first_written = store.bytes_written
    generate(engine, [], 50, resume="session", sequence_id="later")
    store.reset()
    second = capture(HfPager(engine, ["later"]), repo, parents=[first.snapshot.cid], branch="session")
    assert first.snapshot.tokens == 4000
    assert second.snapshot.tokens == 4050
    assert store.bytes_written < 0.03 * first_written
    assert first.pages_copied == 250
    assert second.pages_copied == 4, "three pages that were filled, and the tail"

    before = sum(info.size for info in store.list())
    forks = repo.fork("session", 12)
    assert sum(info.size for info in store.list()) / before <= 1.004

    expected = generate(engine, [], 20, resume="later")
    engine.drop("later")
    engine.drop("session")
    for fork in forks[:2]:
        engine.clear_prefix_cache()
        restore(HfPager(engine), repo, fork.cid, rename=lambda name: f"restored/{name}")
        assert generate(engine, [], 20, resume="restored/later") == expected
        engine.drop("restored/later")
