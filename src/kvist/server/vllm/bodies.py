"""What of a tenant's body may reach vLLM: known fields, under the tenant's salt.

Knows the bodies of completions and chats of vLLM 0.28 to 0.32; must not know tokens, tenants or engines. vLLM takes
fields that it does not know, and its connectors look at some of these: so whatever is not listed here is refused.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from typing import Any, Final

from kvist.errors import Forbidden
from kvist.server.errors import BadRequest
from kvist.server.schema import HARMLESS

_FIELDS: Final = frozenset(
    (
        *(HARMLESS - {"priority", "request_id"}),  # one is at others' expense, the other is ours to choose
        *("model", "prompt", "suffix", "messages", "add_special_tokens", "add_generation_prompt", "echo"),
        *("continue_final_message", "chat_template", "chat_template_kwargs", "documents", "tools", "tool_choice"),
        *("parallel_tool_calls", "functions", "function_call", "modalities", "verbosity", "reasoning_effort"),
        *("include_reasoning", "thinking_token_budget", "truncate_prompt_tokens", "truncation_side"),
        # sampling
        *(
            "n",
            "best_of",
            "max_tokens",
            "max_completion_tokens",
            "min_tokens",
            "temperature",
            "top_p",
            "top_k",
            "min_p",
        ),
        *("seed", "stop", "stop_token_ids", "ignore_eos", "include_stop_str_in_output", "logit_bias", "bad_words"),
        *("allowed_token_ids", "presence_penalty", "frequency_penalty", "repetition_penalty", "repetition_detection"),
        *("use_beam_search", "length_penalty", "response_format", "structured_outputs", "watermarking"),
        # the answer
        *("stream", "stream_options", "stream_interval", "logprobs", "top_logprobs", "prompt_logprobs"),
        *("logprob_token_ids", "return_token_ids", "return_token_offsets", "return_tokens_as_token_ids"),
        *("return_assistant_tokens_mask", "return_prompt_text", "skip_special_tokens", "spaces_between_special_tokens"),
        # looked at below
        *("cache_salt", "kv_transfer_params", "vllm_xargs"),
    )
)
_CARTRIDGE: Final = frozenset({"cartridge_id", "cartridge_label", "cartridge_prefix"})
_OF_CACHES: Final = ("kv_", "ec_")
"""How the names begin that vLLM and its connectors read beside those of an operator's extensions."""


def tenant_body(body: Mapping[str, Any], salt: str) -> dict[str, Any]:
    """A tenant's request as it may reach vLLM: salted, and naming nothing that others may have left there.

    Args:
        body: as it came; ``request_id``, and what is not listed and null, is left out.
        salt: of the tenant.

    Raises:
        BadRequest: a field is of another type.
        Forbidden: it names a snapshot, blocks or images of others, or says what no tenant may.
    """
    said = {name: body[name] for name in body if name in _FIELDS or (body[name] is not None and name != "request_id")}
    _require("", said, _FIELDS)
    _require("kv_transfer_params.", _object(said, "kv_transfer_params"), _CARTRIDGE)
    extra = _object(said, "vllm_xargs")
    _require("vllm_xargs.", extra, [name for name in extra if not name.startswith(_OF_CACHES)])
    messages = said.get("messages")
    if isinstance(messages, list) and any(map(_names_media, messages)):
        raise Forbidden("messages: a part with a uuid is not for tenants: vLLM keeps images by it, and for all")
    own = said.get("cache_salt")
    if own is not None and not isinstance(own, str):
        raise BadRequest("cache_salt: expected text", param="cache_salt")
    mixed = hashlib.sha256(f"{salt}\0{own or ''}".encode(errors="surrogatepass")).hexdigest()
    return said | {"cache_salt": f"kvist:{mixed}"}


def _object(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    found = body.get(name)
    if found is not None and not isinstance(found, dict):
        raise BadRequest(f"{name}: expected an object, got {type(found).__name__}", param=name)
    return found or {}


def _require(place: str, said: Mapping[str, Any], allowed: Collection[str]) -> None:
    for name in said:
        if name not in allowed:
            raise Forbidden(
                f"{place}{name:.80}: not for tenants, who share this engine",
                hint="expected fields of OpenAI's API, vLLM's of sampling, and those of cartridges",
            )


def _names_media(message: Any) -> bool:
    """Whether a part of a message has a name that vLLM keeps its content by."""
    parts = message.get("content") if isinstance(message, dict) else None
    return isinstance(parts, list) and any(isinstance(part, dict) and part.get("uuid") is not None for part in parts)
