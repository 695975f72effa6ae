"""Penalties of what was generated before, beside SGLang's own count of it. Runs where sglang is installed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hicache_real import HAS_SGLANG, load

torch = pytest.importorskip("torch")
if not HAS_SGLANG:
    pytest.skip("sglang is not installed in this environment (make test-sglang)", allow_module_level=True)
load("mem_cache.memory_pool")

from sglang.srt.sampling import penaltylib  # noqa: E402
from sglang.srt.sampling.sampling_params import SamplingParams  # noqa: E402

from kvist.engines.sglang.penalties import count_before, counted, counts  # noqa: E402

VOCABULARY = 50
KINDS = {
    penaltylib.BatchedFrequencyPenalizer,
    penaltylib.BatchedMinNewTokensPenalizer,
    penaltylib.BatchedPresencePenalizer,
    penaltylib.BatchedRepetitionPenalizer,
}
BEFORE = [[3, 3, 3, 7, 9, 3], [], [1, 2]]


class Batch(SimpleNamespace):
    """SGLang refers to it weakly."""


def batch(*params: SamplingParams) -> Any:
    tokenizer = SimpleNamespace(additional_stop_token_ids=None, eos_token_id=2)
    requests = [SimpleNamespace(sampling_params=each, eos_token_ids={2}, tokenizer=tokenizer) for each in params]
    return Batch(reqs=requests, device="cpu")


def logits_of(orchestrator: Any) -> Any:
    logits = torch.linspace(-3, 3, VOCABULARY).repeat(3, 1)
    orchestrator.apply(logits)
    return logits


@pytest.mark.parametrize(
    "params",
    [
        {"frequency_penalty": 0.37},
        {"presence_penalty": 1.1},
        {"repetition_penalty": 1.3},
        {"min_new_tokens": 5},
        {"frequency_penalty": 0.7, "presence_penalty": -0.3, "repetition_penalty": 0.8, "min_new_tokens": 3},
    ],
    ids=str,
)
def test_as_if_it_had_never_stopped(params: dict[str, Any]) -> None:
    """Equal to counting the tokens one by one, bit for bit; a request that goes on from nowhere is as it was."""
    chosen = SamplingParams(**params)
    assert counts(chosen)
    held = batch(chosen, chosen, chosen)
    restored = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, held, KINDS)
    count_before(restored, BEFORE)
    for row, ids in enumerate(BEFORE):
        alone = batch(chosen, chosen, chosen)
        counted = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, alone, KINDS)
        for token in ids:
            counted.cumulate_output_tokens(torch.tensor([token] * 3))
        assert torch.equal(logits_of(restored)[row], logits_of(counted)[row])


def test_what_sglang_would_have_counted() -> None:
    """In turn, what was sampled; overlapped, a token late."""
    assert counted([1, 2, 3, 7, 8, 9], 3, is_late=False) == [7, 8, 9]
    assert counted([1, 2, 3, 7, 8, 9], 3, is_late=True) == [3, 7, 8]


def test_nothing_to_count() -> None:
    plain = SamplingParams(temperature=0.5)
    assert not counts(plain)
    held = batch(plain, plain, plain)
    orchestrator = penaltylib.BatchedPenalizerOrchestrator(VOCABULARY, held, KINDS)
    count_before(orchestrator, BEFORE)
    assert torch.equal(logits_of(orchestrator), torch.linspace(-3, 3, VOCABULARY).repeat(3, 1))
