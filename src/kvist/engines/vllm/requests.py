"""What a request says of itself: how it samples, and what of that can go on from a snapshot.

Knows vLLM's sampling parameters by their names. Must not know blocks or schedules.
"""

from __future__ import annotations

import base64
from typing import Any, Final

from kvist.engines.paged.matching import Stored
from kvist.engines.vllm.cartridges.placing import Standing
from kvist.engines.vllm.messages import Start

_SAMPLING: Final = (
    *("seed", "temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("min_tokens", "max_tokens", "stop", "stop_token_ids", "ignore_eos"),
)


def cartridge(request: Any) -> dict[str, Any] | None:
    """The cartridge that a request begins with, as its answer and a snapshot of it tell; or ``None``."""
    standing = Standing.of(request)
    return None if standing is None else standing.prefix.to_dict()


def draws(params: Any) -> bool:
    """Whether a request draws with a generator of its own."""
    return params is not None and params.seed is not None and params.temperature > 0


def counts_output(params: Any) -> bool:
    """Whether it matters for a request which of its tokens are output."""
    return bool(params.presence_penalty or params.frequency_penalty or params.min_tokens or params.bad_words)


def start_of(request: Any, stored: Stored | None) -> Start | None:
    """What the first step of a restored request must be told, if it goes on exactly where a sequence stood."""
    if stored is None or request.num_tokens != len(stored.token_ids):
        return None
    params, state = request.sampling_params, stored.state
    generator, prompt = None, None
    if draws(params) and "rng" in state and state.get("sampling", {}).get("seed") == params.seed:
        generator = base64.b64decode(state["rng"])
    if counts_output(params) and 0 < state.get("prompt_tokens", 0) < len(stored.token_ids):
        prompt = int(state["prompt_tokens"])
    return None if generator is None and prompt is None else Start(request.request_id, generator, prompt)


def not_carried(params: Any) -> list[str]:
    """What of a request cannot go on as if it had never stopped."""
    found = {
        "structured output: its grammar starts anew": params.structured_outputs is not None,
        "stop texts: one that began before the snapshot is not seen": bool(params.stop),
        "thinking budget: it starts anew": getattr(params, "thinking_token_budget", None) is not None,
        "logit_bias, allowed_token_ids, bad_words: they count if the request that goes on gives them again": bool(
            params.logit_bias or params.allowed_token_ids or params.bad_words
        ),
        "the draws of a request without a seed": params.seed is None and params.temperature > 0,
    }
    return [text for text, is_so in found.items() if is_so]


def sampling(params: Any) -> dict[str, Any]:
    """The parameters that are set, as a snapshot keeps them."""
    found = {name: getattr(params, name, None) for name in _SAMPLING}
    return {
        name: list(value) if isinstance(value, list | tuple | set) else value
        for name, value in found.items()
        if value is not None
    }
