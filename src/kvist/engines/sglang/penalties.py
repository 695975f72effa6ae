"""Penalties of a request that goes on from a snapshot: what it had generated before counts as generated.

SGLang makes a batch's penalties from nothing when it prefills its requests, and counts each token that is sampled from
then on. Knows SGLang's four penalties (0.5.23); must not know snapshots.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import torch


def _frequency(penalizer: Any, row: int, ids: torch.Tensor) -> None:
    # one at a time, as it would have been: a sum of floats depends on its order
    each = penalizer.frequency_penalties[row].expand(len(ids))
    penalizer.cumulated_frequency_penalties[row].scatter_add_(0, ids, each)


def _presence(penalizer: Any, row: int, ids: torch.Tensor) -> None:
    penalizer.cumulated_presence_penalties[row, ids] = penalizer.presence_penalties[row]


def _repetition(penalizer: Any, row: int, ids: torch.Tensor) -> None:
    penalizer.cumulated_repetition_penalties[row, ids] = penalizer.repetition_penalties[row]


def _least(penalizer: Any, row: int, ids: torch.Tensor) -> None:
    penalizer.len_output_tokens[row] += len(ids)


_COUNT: Final[dict[str, Callable[[Any, int, torch.Tensor], None]]] = {
    "BatchedFrequencyPenalizer": _frequency,
    "BatchedPresencePenalizer": _presence,
    "BatchedRepetitionPenalizer": _repetition,
    "BatchedMinNewTokensPenalizer": _least,
}


def counted(token_ids: Sequence[int], prompt: int, *, is_late: bool) -> list[int]:
    """What SGLang would have counted of a request by now.

    Args:
        token_ids: prompt and output.
        prompt: tokens of the prompt.
        is_late: under its overlapped schedule SGLang counts, before each step, the last token that it knows by then:
            the prompt's last one first, and never the one that is sampled last.
    """
    return list(token_ids[max(prompt - 1, 0) : -1] if is_late else token_ids[prompt:])


def count_before(orchestrator: Any, outputs: Sequence[Sequence[int]]) -> None:
    """Count what each request of a batch had generated before.

    Args:
        orchestrator: SGLang's, of a batch that was just made.
        outputs: token ids by request; nothing, for one that goes on from nowhere.
    """
    for penalizer in orchestrator.penalizers.values():
        count = _COUNT.get(type(penalizer).__name__)
        if count is None or not penalizer.is_prepared():
            continue
        for row, ids in enumerate(outputs):
            if ids:
                count(penalizer, row, torch.tensor(list(ids), dtype=torch.int64, device=orchestrator.device))


def counts(params: Any) -> bool:
    """Whether it matters for a request which of its tokens are output."""
    return bool(
        params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0 or params.min_new_tokens
    )
