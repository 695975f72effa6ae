"""What tests do with engines: prompts, runs, and copies of pages from one engine to another."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kvist.engines.hf import Engine, HfPager, SamplingParams, StepOutput


def prompt(length: int, seed: int = 0, vocab: int = 300) -> list[int]:
    """Ids other than the model's end of text."""
    return [int(token) for token in np.random.default_rng([seed, 77]).integers(3, vocab, length)]


def params(max_tokens: int = 8, **changes: Any) -> SamplingParams:
    """Go on for ``max_tokens``, and report logits."""
    return SamplingParams(**({"max_tokens": max_tokens, "ignore_eos": True, "logits": True} | changes))


@dataclass(frozen=True)
class Trace:
    """What a run produced."""

    tokens: list[int]
    logits: bytes

    def __add__(self, other: Trace) -> Trace:
        return Trace(self.tokens + other.tokens, self.logits + other.logits)


def trace(outputs: list[StepOutput]) -> Trace:
    return Trace([output.token_id for output in outputs], b"".join(output.logits.tobytes() for output in outputs))


def run(engine: Engine, token_ids: list[int], max_tokens: int = 8, **changes: Any) -> Trace:
    names = {name: changes.pop(name) for name in ("sequence_id", "resume", "cartridge") if name in changes}
    return trace(engine.submit(token_ids, params(max_tokens, **changes), **names).result())


def page_bytes(engine: Engine, sequence_id: str) -> list[bytes]:
    """The pages of a sequence, in token order."""
    pager = HfPager(engine, [sequence_id])
    (seq,) = pager.logical_seqs()
    pages = [pager.read_page(ix) for ix in seq.page_ixs]
    return [bytes(page.k) + bytes(page.v) for page in pages]


def carry(
    source: Engine, target: Engine, sequence_id: str, *, rename: str | None = None, flip: int | None = None
) -> None:
    """Copy a sequence's pages and state into another engine; ``flip`` flips one bit of that byte on the way."""
    reader, writer = HfPager(source, [sequence_id]), HfPager(target)
    (seq,) = reader.logical_seqs()
    half = reader.meta().page_bytes
    buffer = bytearray(2 * half * len(seq.page_ixs))
    reader.pause()
    reader.read_pages(seq.page_ixs, memoryview(buffer))
    blocks = reader.page_blocks(seq.page_ixs)
    reader.resume()
    if flip is not None:
        buffer[flip] ^= 0x40
    writer.pause()
    slots = writer.allocate_pages(len(seq.page_ixs))
    writer.write_pages(slots, memoryview(bytes(buffer)), blocks)
    writer.install_logical_seqs([replace(seq, id=rename or seq.id, page_ixs=tuple(slots))])
    writer.resume()
