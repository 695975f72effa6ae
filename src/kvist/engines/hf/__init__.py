"""The embedded engine: any transformers causal LM over a paged, shared KV pool, deterministic by construction.

For a model that is `canonical`, what runs beside a sequence never changes its bits, and a page's bytes are a function
of its tokens alone: prefill, decode and prefill after eviction give the same. `kvist.engines.hf.model` says how (tiles
of one shape), checks it when it loads, and names the exceptions (mixtures of experts whose rows mix). The promise holds
on one machine with one build and thread count; `Engine.numerics` names them, and says whether the model is canonical.

What it costs, in CPU time on one core against transformers' own `generate` (Llama shape, 4 layers of 256, f32, a
prompt of 300 tokens; torch 2.13, transformers 5.23):

    =========================  ====================  ====================
    tokens a page              16                    64
    =========================  ====================  ====================
    decode, one sequence       0.8 of the speed      0.45 of the speed
    prefill                    4.4 times the time    1.9 times the time
    eight sequences at once    5.3 times the time    7.4 times the time
    =========================  ====================  ====================

A decode step computes a whole tile for one token, a prompt goes tile by tile instead of at once, and sequences are
never batched: throughput does not grow with load. Large pages suit long prompts, small ones suit decoding and sharing.

A request may begin with a cartridge (`Engine.load_cartridge`, ``submit(..., cartridge=)``): the KV of a document that
nobody computes again. `kvist.engines.hf.cartridges` says what it shares with whom, and how snapshots tell of it.
"""

from __future__ import annotations

from kvist.engines.hf.engine import Engine
from kvist.engines.hf.owned import AnyEngine, OwnedEngine, Owner
from kvist.engines.hf.pager import HfPager
from kvist.engines.hf.sampling import SamplingParams
from kvist.engines.hf.sequence import Event, FinishReason, Request, SequenceInfo, StepOutput

__all__ = [
    "AnyEngine",
    "Engine",
    "Event",
    "FinishReason",
    "HfPager",
    "OwnedEngine",
    "Owner",
    "Request",
    "SamplingParams",
    "SequenceInfo",
    "StepOutput",
]
