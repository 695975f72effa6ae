"""What bench/fidelity.py asks of both sides: a trace for servers, and small random ones for vLLM's scheduler alone."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from typing import Any

import numpy as np

from kvist.sim.config import EngineConfig
from kvist.sim.timing import Linear
from kvist.sim.trace import Trace

TRACE_BLOCK = 64
PASS_MS = 10.0
EVEN = Linear((0.0, 0.0, PASS_MS), (0.0, 0.0, PASS_MS), -PASS_MS)
"""Every pass takes as long."""


def make_trace(count: int, seed: int) -> Trace:
    """A third asks about a document of a shelf, by a Zipf law; a third goes on with a conversation; some repeat."""
    draw = random.Random(seed)
    fresh = itertools.count()
    shelf = [[next(fresh) for _ in range(draw.randint(2, 9))] for _ in range(24)]
    weights = [1 / (rank + 1) for rank in range(len(shelf))]
    talks = [[next(fresh)] for _ in range(12)]
    rows: list[tuple[list[int], int]] = []
    while len(rows) < count:
        kind = draw.random()
        if kind < 0.15 and rows:
            rows.append(draw.choice(rows[-40:]))
            continue
        if kind < 0.55:
            blocks = draw.choices(shelf, weights)[0] + [next(fresh) for _ in range(draw.randint(0, 3))]
        else:
            talk = draw.choice(talks)
            talk += [next(fresh) for _ in range(draw.randint(1, 3))]
            blocks = list(talk)
            if len(talk) > 14:
                talk[:] = [next(fresh)]
        cut = 0 if draw.random() < 0.3 else draw.randrange(1, TRACE_BLOCK)
        rows.append((blocks, len(blocks) * TRACE_BLOCK - cut))
    ids = [blocks for blocks, _ in rows]
    return Trace(
        name="fidelity",
        block_size=TRACE_BLOCK,
        arrival_ms=np.zeros(count),
        input_tokens=np.array([tokens for _, tokens in rows]),
        output_tokens=np.array([draw.choice((1, 4, 12, 24, 40, 64)) for _ in rows]),
        offsets=np.cumsum([0, *map(len, ids)]),
        block_ids=np.array(list(itertools.chain.from_iterable(ids))),
        previous=np.full(count, -1),
        delay_ms=np.zeros(count),
        request_ids=tuple(map(str, range(count))),
    )


def prompts_of(trace: Trace) -> list[list[int]]:
    """Token ids: a run of its own for each trace block."""
    runs: dict[int, list[int]] = {}
    for block in trace.block_ids.tolist():
        if block not in runs:
            draw = random.Random(f"block {block}")
            runs[block] = [draw.randrange(7, 500) for _ in range(trace.block_size)]
    prompts = []
    for row, tokens in enumerate(trace.input_tokens.tolist()):
        prompts.append([token for block in trace.blocks(row).tolist() for token in runs[block]][:tokens])
    return prompts


@dataclass(frozen=True)
class Case:
    """A small trace, and the engine that it is for.

    Attributes:
        trace: the columns of a `Trace` that a file must say.
        engine: the fields of an `EngineConfig`.
    """

    trace: dict[str, Any]
    engine: dict[str, Any]

    def build(self) -> tuple[Trace, EngineConfig]:
        rows = len(self.trace["input_tokens"])
        columns = {name: np.array(values) for name, values in self.trace.items() if isinstance(values, list)}
        empty: dict[str, Any] = {"previous": np.full(rows, -1), "delay_ms": np.zeros(rows)}
        names = tuple(map(str, range(rows)))
        trace = Trace("case", self.trace["block_size"], request_ids=names, **columns, **empty)
        return trace, EngineConfig(**self.engine, timing=EVEN)


def make_case(seed: int) -> Case:
    """Few blocks and long answers, so that requests wait and give way; shared, cut and repeated prefixes."""
    draw = random.Random(seed)
    size = draw.choice((4, 8, 16))
    longest = size * draw.randint(10, 20)
    budget = draw.choice((size * 2, size * 4, longest, 3 * longest))
    block = draw.choice((size, 2 * size, size + 3))  # of the trace
    fresh = itertools.count()
    shelf = [[next(fresh) for _ in range(max(1, longest // block - 1))] for _ in range(draw.randint(1, 6))]
    gap = draw.choice((0.0, 5.0, 40.0, 150.0))
    ids: list[list[int]] = []
    inputs: list[int] = []
    arrivals = [0.0]
    for _ in range(draw.randint(20, 60)):
        if ids and draw.random() < 0.15:
            row = draw.randrange(len(ids))
            blocks, tokens = ids[row], inputs[row]
        else:
            book = draw.choice(shelf)
            kept = book[: draw.randint(0, len(book))]
            blocks = (kept + [next(fresh) for _ in range(draw.randint(not kept, 2))])[: max(1, (longest - 2) // block)]
            tokens = len(blocks) * block - draw.choice((0, draw.randrange(block)))
        ids.append(blocks)
        inputs.append(tokens)
        arrivals.append(round(arrivals[-1] + (draw.expovariate(1 / gap) if gap else 0.0), 6))
    trace = {"block_size": block, "arrival_ms": arrivals[:-1], "input_tokens": inputs}
    trace["output_tokens"] = [draw.randint(1, max(1, min(longest - tokens, 60))) for tokens in inputs]
    trace |= {"offsets": [0, *itertools.accumulate(map(len, ids))], "block_ids": list(itertools.chain(*ids))}
    engine = {"num_blocks": longest // size + draw.randint(2, 40), "block_size": size, "max_model_len": longest}
    engine |= {"max_num_batched_tokens": budget, "max_num_seqs": min(draw.choice((2, 4, 8, 32)), budget)}
    return Case(trace, engine)
