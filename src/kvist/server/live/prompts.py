"""The prompt of a request that goes on from a snapshot: put in, or checked. Must not know engines."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvist.repo import LogicalSeq
from kvist.server.errors import BadRequest


def fill_prompt(body: dict[str, Any], seq: LogicalSeq, cid: str) -> list[int] | None:
    """Put the ``prompt`` of a completion in, or check it; see `dialect.Fill`.

    Raises:
        BadRequest: it is text, or ids that do not begin as the sequence.
    """
    prompt = body.get("prompt")
    if prompt is None or prompt == "" or prompt == []:
        body["prompt"] = list(seq.token_ids)
        return list(seq.token_ids)
    if is_ids(prompt):
        require_start(prompt, seq, cid, "prompt")
        return list(prompt)
    if isinstance(prompt, list) and all(is_ids(each) for each in prompt):
        for each in prompt:
            require_start(each, seq, cid, "prompt")
        return list(prompt[0]) if len(prompt) == 1 else None
    raise BadRequest(
        "prompt: where a snapshot is named, expected nothing or token ids that start with the snapshot's, got text; "
        "after a checkout, a text whose tokens start so goes on from it without naming it",
        param="prompt",
    )


def is_ids(value: Any) -> bool:
    """Whether it is a list of token ids, and not an empty one."""
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def require_start(ids: Sequence[int], seq: LogicalSeq, cid: str, param: str) -> None:
    """Refuse token ids that do not begin with those of a sequence.

    Args:
        ids: of a request.
        seq: the sequence that it names.
        cid: of its snapshot.
        param: the field that ``ids`` came in.

    Raises:
        BadRequest: they do not.
    """
    known = seq.token_ids
    if tuple(ids[: len(known)]) == known:
        return
    same = next((n for n, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), min(len(known), len(ids)))
    raise BadRequest(
        f"{param}: must be left out, or start with the {len(known)} token ids of sequence {seq.id!r} of {cid}; it has "
        f"{len(ids)} ids, and {same} of them agree",
        param=param,
    )


def require_absent(body: Mapping[str, Any], fields: Collection[str]) -> None:
    """Refuse what would make another prompt of the one that a snapshot gives.

    Raises:
        BadRequest: one of ``fields`` is there, and not null.
    """
    for name in fields:
        if body.get(name) is not None:
            raise BadRequest(f"{name}: must be left out where a snapshot is named", param=name)
