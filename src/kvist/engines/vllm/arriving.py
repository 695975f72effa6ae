"""The engine core's half of `kvist.engines.vllm.intake`: a cartridge's tokens come before a request's prompt.

Every request passes `EngineCore.preprocess_add_request` before its blocks are hashed; also those that no front end of
kvist's saw: what vLLM itself makes of a request that was refused, and what another front end sends. So nothing that
comes with a request is believed. Reaches into vLLM as `kvist.engines.vllm.internals` does, on the same versions.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

from vllm.v1.metrics.stats import PrefillStats

from kvist.engines.vllm.cartridges.placing import KEY, Standing


def enter_placing(place: Callable[[Any, Any, Any], tuple[Standing, list[int]] | None]) -> None:
    """Put a cartridge's tokens before the prompt of every request that says so, before its blocks are hashed.

    Idempotent. The API process, which counts and returns what the client sent, is not told of them.

    Args:
        place: for an engine core, a request and the marker that came with it: the cartridge that it begins with, and
            its token ids then; ``None``: the core has no cartridges.
    """
    from vllm.v1.engine.core import EngineCore

    preprocess = EngineCore.preprocess_add_request
    if hasattr(preprocess, "places"):
        return

    @functools.wraps(preprocess)
    def preprocess_add_request(self: Any, request: Any) -> Any:
        params = request.sampling_params
        transfer = ((params.extra_args if params is not None else None) or {}).get("kv_transfer_params")
        if not isinstance(transfer, Mapping):
            return preprocess(self, request)
        # vLLM makes one that ends at once of what a client said in a request that was refused
        if getattr(request, "abort_immediately", False):
            return _preprocessed(self, request, {**transfer, KEY: None})
        if KEY not in transfer:
            return preprocess(self, request)
        found = None if transfer[KEY] is None else place(self, request, transfer[KEY])
        return _preprocessed(self, request, transfer, found)

    def _preprocessed(self: Any, request: Any, transfer: Mapping[str, Any], found: Any = None) -> Any:
        standing, ids = found or (None, None)
        request = copy.copy(request)  # where there is one process, it is the API's too
        request.sampling_params = copy.copy(request.sampling_params)
        own = {name: value for name, value in transfer.items() if name != KEY}
        request.sampling_params.extra_args = {**request.sampling_params.extra_args, "kv_transfer_params": own}
        if ids is not None:
            request.prompt_token_ids = ids
        prepared = preprocess(self, request)
        prepared[0].kv_transfer_params = {**own, KEY: standing}
        if standing is not None and standing.prefix.placed:
            prepared[0].prefill_stats = OwnStats(standing.prefix.tokens)
        return prepared

    preprocess_add_request.places = True  # type: ignore[attr-defined]
    EngineCore.preprocess_add_request = preprocess_add_request


def placeholder_of(vllm_config: Any) -> int:
    """What begins every text, and is never sampled: so a penalty on a prompt's tokens changes nothing by it."""
    begin = begin_of(vllm_config)
    return 0 if begin is None else begin


def begin_of(vllm_config: Any) -> int | None:
    """The token that begins every text; ``None``: there is none."""
    config = vllm_config.model_config
    begin = getattr(config.hf_text_config, "bos_token_id", None)
    return begin if type(begin) is int and 0 <= begin < config.get_vocab_size() else None


class OwnStats(PrefillStats):
    """What of a prefill is the client's: vLLM counts the cartridge's tokens, its users are told of their own."""

    def __init__(self, prefix: int) -> None:
        super().__init__()
        self._prefix = prefix

    def set(self, num_prompt_tokens: int, num_local_cached_tokens: int, num_external_cached_tokens: int) -> None:
        """See the base class."""
        local = max(0, num_local_cached_tokens - self._prefix)
        cached = max(0, num_local_cached_tokens + num_external_cached_tokens - self._prefix)
        super().set(num_prompt_tokens - self._prefix, local, cached - local)

    def finalize(self, num_cached_tokens: int) -> None:
        """See the base class."""
        super().finalize(max(0, num_cached_tokens - self._prefix))
