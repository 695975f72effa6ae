"""The guarantee: bits are a function of tokens alone, however, when and beside whatever they were computed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from kvist.engines.hf import Engine

from .driving import page_bytes, params, prompt, run, trace

Load = Callable[..., Engine]

CASES = [("llama", None), ("gpt2", None), ("gemma2", None), ("gemma3", "bf16"), ("mistral", "f16"), ("qwen3_moe", None)]


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_neighbours_never_change_bits(family: str, dtype: str | None, load: Load) -> None:
    ids = prompt(37)
    alone = run(load(family, dtype=dtype), ids, 16)
    crowd = load(family, dtype=dtype, pages=128)
    neighbours = [crowd.submit(prompt(5 + 7 * n, seed=n + 1), params(8)) for n in range(8)]
    assert run(crowd, ids, 16) == alone
    assert all(len(neighbour.result()) == 8 for neighbour in neighbours)


@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_decoded_pages_equal_prefilled_pages(family: str, dtype: str | None, load: Load) -> None:
    """Generate past several pages; prefill the same ids at once, and from every kind of cut."""
    first = load(family, dtype=dtype)
    ids = prompt(10)
    decoded = first.submit(ids, params(40), sequence_id="decoded")
    outputs = decoded.result()
    whole = ids + [output.token_id for output in outputs]
    second = load(family, dtype=dtype)
    prefilled = second.submit(whole[:-1], params(1), sequence_id="prefilled").result()
    assert page_bytes(second, "prefilled") == page_bytes(first, "decoded")
    assert prefilled[0].logits.tobytes() == outputs[-1].logits.tobytes()


@pytest.mark.parametrize("cut", [1, 15, 16, 17, 31, 32, 33, 47])
def test_where_a_prompt_is_cut_does_not_show(cut: int, load: Load) -> None:
    """A prefix computed before, in another request, then the rest: as in one go."""
    engine, ids = load(), prompt(48)
    expected = run(load(), ids, 6, sequence_id="whole")
    run(engine, ids[:cut], 1, sequence_id="start")
    request = engine.submit(ids, params(6), sequence_id="whole")
    assert trace(request.result()) == expected
    assert request.cached_tokens == cut


def test_page_size_one(load: Load) -> None:
    """The degenerate tile: one row."""
    one, ids = load(page_size_tokens=1, pages=64), prompt(20)
    assert run(one, ids, 10).tokens == run(load(), ids, 10).tokens


def test_long_contexts(load: Load) -> None:
    """Past the block sizes of attention kernels."""
    ids = prompt(300)
    first, second = load(), load()
    decoded = run(first, ids[:200], 110)
    whole = ids[:200] + decoded.tokens
    assert run(second, whole[:-1], 1).logits == decoded.logits[-300 * 4 :]
