"""What a replay leaves behind: a row for each request, and what all passes came to."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

COMPLETED, REJECTED = 0, 1
STATUS = ("completed", "rejected")


@dataclass(frozen=True, slots=True)
class Segment:
    """Passes in a row of one worker, for a timeline.

    Attributes:
        worker: which.
        start_ms: when the first began.
        end_ms: when the last ended.
        prefill_tokens: new prompt tokens, of one pass; 0 in passes that only decode.
        decodes: sequences that got a token in each pass.
        passes: how many.
        waiting: requests in the queue at the start.
        used_blocks: slots that sequences held at the start.
    """

    worker: int
    start_ms: float
    end_ms: float
    prefill_tokens: int
    decodes: int
    passes: int
    waiting: int
    used_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Records:
    """Columns with a row for each request of the trace, in its order; NaN is what never came.

    Attributes:
        arrival_ms: when the request came.
        input_length: prompt tokens.
        requested_output_length: tokens that it asked for.
        output_length: tokens that it got.
        first_admit_ms: begin of the first pass that worked on it.
        first_token_ms: end of the pass that gave the first token.
        second_token_ms: and the second.
        last_token_ms: and the last.
        reused_input_tokens: tokens that were in the cache, the most of all admissions (as Dynamo reports).
        first_reused_input_tokens: of the first admission.
        admission_count: times that it came to run; each after the first follows a preemption.
        status: 0 completed, 1 rejected.
        worker: who served it (with disaggregation: who decoded); each rank counts as one. -1: nobody.
        prefill_worker: who computed its prompt, where that is another's work; -1: nobody.
        token_gaps_ms: distinct times between two tokens of one sequence, ascending.
        token_gap_counts: how many of each.
        prefill_tokens: tokens computed as prompts, those of preempted requests again.
        passes: of all workers.
        evicted_blocks: contents that left a pool.
        busy_ms: a row for each worker: time in passes.
        duration_ms: until the last pass ended.
        segments: passes on a timeline, where asked for.
    """

    arrival_ms: NDArray[np.float64]
    input_length: NDArray[np.int64]
    requested_output_length: NDArray[np.int64]
    output_length: NDArray[np.int64]
    first_admit_ms: NDArray[np.float64]
    first_token_ms: NDArray[np.float64]
    second_token_ms: NDArray[np.float64]
    last_token_ms: NDArray[np.float64]
    reused_input_tokens: NDArray[np.int64]
    first_reused_input_tokens: NDArray[np.int64]
    admission_count: NDArray[np.int64]
    status: NDArray[np.int8]
    worker: NDArray[np.int32]
    prefill_worker: NDArray[np.int32]
    token_gaps_ms: NDArray[np.float64]
    token_gap_counts: NDArray[np.int64]
    prefill_tokens: int
    passes: int
    evicted_blocks: int
    busy_ms: NDArray[np.float64]
    duration_ms: float
    segments: tuple[Segment, ...] = ()

    def __len__(self) -> int:
        return len(self.arrival_ms)

    @property
    def readmission_count(self) -> NDArray[np.int64]:
        """Times that each request came to run again after a preemption; with disaggregation it comes to run twice."""
        stages = 1 + ((self.prefill_worker >= 0) & (self.worker >= 0))
        return np.maximum(self.admission_count - stages, 0)

    @property
    def preemptions(self) -> int:
        """Times that a request gave way and came back."""
        return int(self.readmission_count.sum())
