"""Traces: requests with their times, their lengths and the content of their prompts; and the files they come in.

The form is Mooncake's JSONL (https://github.com/kvcache-ai/Mooncake), one request a line, in all its spellings:

| field | means |
| --- | --- |
| `timestamp`, `created_time` | when it comes, ms; from any origin, integer or not |
| `input_length`, `input_tokens` | tokens of the prompt, 1 or more |
| `output_length`, `output_tokens` | tokens to generate, 0 or more |
| `hash_ids` | one id (64 bits, unsigned) a block of the prompt; equal ids: equal content |
| `session_id` | rows with the same one are turns: each comes when the turn before it has ended, and a while later |
| `delay`, `delay_ms` | that while, ms, 0 or more; not on a first turn |
| `request_id` | its name; else its number among the requests of the file, from 0 |
| `priority`, `strict_priority`, `output_token_ids` | checked, and not used |

Our superset adds trees of requests and says how large its blocks are:

* the first line may be `{"kvist_trace": 1, "block_size": 512}`;
* `after` names an earlier request by its `request_id`: this one comes `delay` after the end of that one. Several may
  come after the same one: that is a fork. Such a row has neither `timestamp` nor `session_id`.

What the files leave open is as NVIDIA Dynamo 1.6.1's replay has it (each was tried on it):

* The first arrival is moved to 0, and all others with it.
* Requests come in the order of their times; of equal times, in the order of the file. Lines that are blank are skipped.
* A later turn may have a time in place of a delay: its delay is then the time since the last that its session gave. A
  delay wins over a time; with neither it is 0.
* A turn that follows one that was rejected comes at its delay after the rejection.
* Times may be missing where arrivals do not depend on them (a closed loop); see `Trace.has_arrivals`.
* `output_length` 0 is a request that is prefilled and then ends without a token; `input_length` 0 is an error.
* More ids than the prompt fills are allowed, fewer are not.

A field that we do not know is an error here; Dynamo skips it.
"""

from __future__ import annotations

from kvist.sim.trace.columns import MAX_MS, MAX_TOKENS, MOONCAKE_BLOCK_SIZE, Floats, Ints, Trace, TraceBuilder
from kvist.sim.trace.jsonl import read_trace, write_trace

__all__ = [
    "MAX_MS",
    "MAX_TOKENS",
    "MOONCAKE_BLOCK_SIZE",
    "Floats",
    "Ints",
    "Trace",
    "TraceBuilder",
    "read_trace",
    "write_trace",
]
