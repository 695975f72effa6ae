"""The requests of a replay, as columns: what each asks for, and what comes of it."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from kvist.sim.pool import Contents

NEVER = -1


@dataclass(slots=True)
class Requests:
    """Rows are numbered from 0; a live engine appends. Times are nanoseconds, `NEVER` what has not come.

    Attributes:
        input_tokens: of the prompt.
        output_tokens: wanted; 0: only the prompt is computed.
        blocks: contents of the prompt's full blocks.
        own: the first content of the blocks that come after those: nobody else has them.
        arrival: when it came to a worker.
        admitted: begin of the first pass that worked on it.
        first_token: end of the pass that gave it.
        second_token: and the next.
        last_token: of the last one so far.
        generated: tokens that it got.
        reused: tokens found in the cache, the most of all its admissions.
        first_reused: and at its first.
        admissions: how often it came to run.
        rejected: that it can never run.
        worker: who has it.
        prefill_worker: who computed its prompt, where that is another's work.
    """

    input_tokens: list[int] = field(default_factory=list)
    output_tokens: list[int] = field(default_factory=list)
    blocks: list[Contents] = field(default_factory=list)
    own: list[int] = field(default_factory=list)
    arrival: list[int] = field(default_factory=list)
    admitted: list[int] = field(default_factory=list)
    first_token: list[int] = field(default_factory=list)
    second_token: list[int] = field(default_factory=list)
    last_token: list[int] = field(default_factory=list)
    generated: list[int] = field(default_factory=list)
    reused: list[int] = field(default_factory=list)
    first_reused: list[int] = field(default_factory=list)
    admissions: list[int] = field(default_factory=list)
    rejected: list[bool] = field(default_factory=list)
    worker: list[int] = field(default_factory=list)
    prefill_worker: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.input_tokens)

    def add(self, input_tokens: int, output_tokens: int, blocks: Contents, own: int) -> int:
        """Append a request; returns its number."""
        self.input_tokens.append(input_tokens)
        self.output_tokens.append(output_tokens)
        self.blocks.append(blocks)
        self.own.append(own)
        for times in (self.arrival, self.admitted, self.first_token, self.second_token, self.last_token):
            times.append(NEVER)
        for counts in (self.generated, self.reused, self.first_reused, self.admissions):
            counts.append(0)
        self.rejected.append(False)
        self.worker.append(NEVER)
        self.prefill_worker.append(NEVER)
        return len(self.input_tokens) - 1

    def contents(self, request: int, start: int, end: int) -> Contents:
        """Contents of the blocks from ``start`` to ``end`` of a request, prompt and answer."""
        prompt = self.blocks[request]
        if end <= len(prompt):
            return prompt[start:end]
        own = self.own[request] - len(prompt)
        answer = np.arange(own + max(start, len(prompt)), own + end)
        return np.concatenate((prompt[start:], answer)) if start < len(prompt) else answer
