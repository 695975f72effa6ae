"""How SGLang's API server speaks (0.5.23), for `kvist.server.live`. Must not know engines, tenants or tokens."""

from __future__ import annotations

from typing import Any, Final

from kvist.repo import LogicalSeq
from kvist.server.errors import BadRequest
from kvist.server.live.dialect import Dialect, Generating
from kvist.server.live.prompts import fill_prompt, is_ids, require_start


def _fill_completion(body: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int] | None:
    ids = fill_prompt(body, seq, cid)
    _name(body, seq, cid)
    return ids


def _fill_chat(body: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int]:
    """Put the prompt's ids where SGLang takes them instead of rendering the messages, or check them."""
    messages, ids = body.get("messages"), body.get("input_ids")
    if ids is None and messages:
        raise BadRequest(
            "messages: must be left out or empty where a snapshot is named without input_ids; after a checkout, a chat "
            "whose tokens start with the snapshot's goes on from it without naming it",
            param="messages",
        )
    if not messages:
        body["messages"] = [{"role": "user", "content": ""}]  # never rendered; SGLang asks for one
    if ids is None:
        ids = body["input_ids"] = list(seq.token_ids)
    elif not is_ids(ids):
        raise BadRequest(f"input_ids: expected token ids, got {ids!r:.80}", param="input_ids")
    require_start(ids, seq, cid, "input_ids")
    _name(body, seq, cid)
    return list(ids)


def _name(body: dict[str, Any], seq: LogicalSeq, cid: str) -> None:
    """Say it where the scheduler sees it; see `kvist.engines.sglang.requests.wanted`."""
    said = body.get("custom_params")
    if said is not None and not isinstance(said, dict):
        raise BadRequest(f"custom_params: expected an object, got {type(said).__name__}", param="custom_params")
    body["custom_params"] = {**(said or {}), "kvist": {"snapshot": cid, "sequence": seq.id}}


SGLANG: Final = Dialect(
    engine="SGLang",
    generating={
        "/v1/completions": Generating("", _fill_completion),
        "/v1/chat/completions": Generating("", _fill_chat),
    },
    for_tenants=frozenset(),
    computing=frozenset({"/generate", "/v1/responses", "/v1/messages", "/v1/tokenize", "/v1/detokenize"}),
    tokens_option="tokens in KVIST_SGLANG",
)
"""SGLang keeps whatever its clients name apart only by salts that they choose: so none of its routes is for tenants."""
