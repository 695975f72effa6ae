"""How vLLM's API server speaks (0.28 to 0.32), for `kvist.server.live`. Must not know engines, tenants or tokens."""

from __future__ import annotations

from typing import Any, Final

from kvist.repo import LogicalSeq
from kvist.server.errors import BadRequest
from kvist.server.live.dialect import Dialect, Generating
from kvist.server.live.prompts import fill_prompt, is_ids, require_absent, require_start
from kvist.server.vllm.bodies import tenant_body

_TRUNCATING: Final = ("truncate_prompt_tokens",)


def _fill_completion(body: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int] | None:
    require_absent(body, ("prompt_embeds", *_TRUNCATING))
    return fill_prompt(body, seq, cid)


def _fill_chat(body: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int]:
    """Put the prompt's ids where vLLM takes them instead of rendering the messages, or check them."""
    require_absent(body, _TRUNCATING)
    messages, transfer = body.get("messages"), body["kv_transfer_params"]
    ids = transfer.get("prompt_token_ids")
    texts = messages if isinstance(messages, list) else []
    if ids is None and messages:
        raise BadRequest(
            "messages: must be left out or empty where a snapshot is named without kv_transfer_params.prompt_token_ids;"
            " after a checkout, a chat whose tokens start with the snapshot's goes on from it without naming it",
            param="messages",
        )
    if body.get("echo") or any(not isinstance(message, dict) or _has_more_than_text(message) for message in texts):
        raise BadRequest(  # vLLM would render the messages after all
            "messages: only texts, and no echo, where a snapshot is named", param="messages"
        )
    if not messages:
        body["messages"] = [{"role": "user", "content": ""}]  # never rendered; vLLM asks for one
    if ids is None:
        ids = transfer["prompt_token_ids"] = list(seq.token_ids)
    elif not is_ids(ids):
        raise BadRequest(
            f"kv_transfer_params.prompt_token_ids: expected token ids, got {ids!r:.80}",
            param="kv_transfer_params.prompt_token_ids",
        )
    require_start(ids, seq, cid, "kv_transfer_params.prompt_token_ids")
    return list(ids)


def _has_more_than_text(message: dict[str, Any]) -> bool:
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    return any(not isinstance(part, str | dict) or (isinstance(part, dict) and "text" not in part) for part in parts)


VLLM: Final = Dialect(
    engine="vLLM",
    generating={
        "/v1/completions": Generating("cmpl-", _fill_completion, tenant_body),
        "/v1/chat/completions": Generating("chatcmpl-", _fill_chat, tenant_body),
    },
    for_tenants=frozenset({"/v1/models", "/version", "/tokenize", "/detokenize"}),
    computing=frozenset(
        {
            "/v1/responses", "/v1/messages", "/v1/embeddings", "/v1/score", "/score", "/v1/rerank", "/v2/rerank",
            "/rerank", "/pooling", "/classify", "/v1/audio/transcriptions", "/v1/audio/translations",
            "/inference/v1/generate",
        }
    ),
    tokens_option="tokens in kv_connector_extra_config",
)  # fmt: skip
