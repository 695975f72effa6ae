"""Models whose cache is not one group of full attention: sliding windows in several groups, and MLA."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvist.testing.scenario.requests import Past, assert_same, cases, check_out, error_of, go_on, interrupt
from kvist.testing.scenario.store import manifests_of
from kvist.testing.vllm import VllmServer

# A latent cache has blocks of 16 on the CPU (vllm 0.32).
BLOCK = {"windows": 32, "latent": 16}
CASES = cases((1, 33, 150, 500), seed=80)
NAMES = [case.name for case in CASES]


@pytest.fixture(scope="module", params=list(BLOCK))
def shape(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def history(
    shape: str, model: Callable[..., Path], start: Callable[..., VllmServer], tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, dict[str, Past]]:
    store = (tmp_path_factory.mktemp("kv") / shape).as_uri()
    server = start(model(shape), store, block_size=BLOCK[shape])
    pasts = {case.name: interrupt(server, case) for case in CASES}
    server.kill()
    return store, pasts


@pytest.fixture(scope="module")
def fresh(
    history: tuple[str, dict[str, Past]], shape: str, model: Callable[..., Path], start: Callable[..., VllmServer]
) -> Iterator[VllmServer]:
    server = start(model(shape), history[0], block_size=BLOCK[shape])
    yield server
    server.kill()


@pytest.mark.parametrize("name", NAMES)
def test_goes_on_bit_for_bit(name: str, history: tuple[str, dict[str, Past]], fresh: VllmServer) -> None:
    before = history[1][name]
    check_out(fresh, before)
    got = go_on(fresh, before)
    assert_same(got.steps, before.next_steps())
    assert got.cached_tokens == before.tokens - 1


def test_what_is_stored(shape: str, history: tuple[str, dict[str, Past]], fresh: VllmServer) -> None:
    """Of sliding layers only the pages that a later token can still see."""
    before = history[1]["greedy-500"]
    manifests = manifests_of(history[0], before.cid)
    kinds = sorted({manifest.layout.attention for manifest in manifests})
    assert [manifest.layout.group for manifest in manifests] == list(range(len(manifests)))
    assert {manifest.layout.n_groups for manifest in manifests} == {len(manifests)}
    if shape == "latent":
        assert kinds == ["mla"]
        return
    assert kinds == ["full", "sliding:64"]
    assert sum(manifest.layout.n_layers for manifest in manifests) == 6
    for manifest in manifests:
        (seq,) = manifest.sequences
        assert seq.cached_tokens(32) == before.tokens - 1
        if manifest.layout.attention == "full":
            assert seq.first_page == 0
        else:
            assert len(seq.page_ixs) <= 64 // 32 + 1
            assert seq.first_page > 10


def test_another_model_is_refused(history: tuple[str, dict[str, Past]], fresh: VllmServer, shape: str) -> None:
    from kvist.testing.scenario.store import altered

    cid = altered(history[0], history[1]["greedy-33"].cid, model="org/another", revision="r9")
    message = error_of(fresh.http.post("/v1/processfork/checkout", json={"cid": cid}), 409, "layout_mismatch")
    assert "'org/another' there" in message
    assert "'r9' there" in message
