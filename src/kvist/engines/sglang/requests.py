"""What a request of SGLang's says of itself: its name, how it samples, and what of that can go on from a snapshot.

Knows SGLang's sampling parameters by their names (0.5.23). Must not know pages or schedules.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass, field
from typing import Any, Final

from kvist.engines.paged import requests

_SUFFIX: Final = re.compile(r"~[0-9a-f]{8}(?:_\d+)?\Z")
_CHOICE: Final = re.compile(r"\+[0-9a-f]{8}\Z")
"""After signs that clients hardly use: an id of their own like "job-20251122" is all name."""
_SAMPLING: Final = {
    "seed": "sampling_seed",
    "temperature": "temperature",
    "top_p": "top_p",
    "min_p": "min_p",
    "presence_penalty": "presence_penalty",
    "frequency_penalty": "frequency_penalty",
    "repetition_penalty": "repetition_penalty",
    "min_tokens": "min_new_tokens",
    "max_tokens": "max_new_tokens",
    "stop": "stop_strs",
    "stop_token_ids": "stop_token_ids",
    "ignore_eos": "ignore_eos",
}
"""As OpenAI's API, with SGLang's additions to it, calls them, and as SGLang does."""
_ALL: Final = 1 << 30
"""SGLang's ``top_k`` where every token may be drawn."""


@dataclass(slots=True)
class Standing:
    """What kvist has to do with a request.

    Attributes:
        salt: its own cache salt, in place of which it has a snapshot's.
        prompt_tokens: how many of its tokens were a prompt when it was first asked.
        before: what it had generated before, where that counts.
    """

    salt: str | None
    prompt_tokens: int
    before: list[int] = field(default_factory=list)


def standing(request: Any) -> Standing | None:
    """Of a request that goes on from a snapshot."""
    return getattr(request, "kvist", None)


def own_salt(request: Any) -> str | None:
    """What keeps a request's pages apart from others', as it came: its cache salt, and its extra key if it has one."""
    known = standing(request)
    salt: str | None = known.salt if known is not None else request.cache_salt
    return salt if request.extra_key is None else json.dumps([request.extra_key, salt])


def wanted(request: Any) -> tuple[str, str] | None:
    """The snapshot and the sequence that a request names, as `kvist.server.sglang` says it."""
    said = (request.sampling_params.custom_params or {}).get("kvist")
    if not isinstance(said, dict):
        return None
    cid, sequence = said.get("snapshot"), said.get("sequence")
    return (cid, sequence) if isinstance(cid, str) and isinstance(sequence, str) else None


def called(name: str) -> str:
    """An id for a request that its client calls ``name``: no two are equal, and none begins as another."""
    return f"{name}~{secrets.token_hex(4)}"


def choice(rid: str) -> str:
    """The id of one of the samples that a request asks for: SGLang runs each as a request of its own."""
    return f"{whole(rid)}+{secrets.token_hex(4)}"


def whole(rid: str) -> str:
    """The id of the request that a sample is of."""
    return _CHOICE.sub("", rid)


def name(rid: str) -> str:
    """What the client called a request: its id without what made it unlike any other."""
    return _SUFFIX.sub("", whole(rid))


def is_called(rid: str, wanted: str) -> bool:
    """Whether a client that says ``wanted`` means this request: by its answer's id, or its X-Request-Id."""
    return whole(wanted) == whole(rid) or wanted == name(rid)


def state(request: Any, *, finished: bool, deterministic: bool) -> dict[str, Any]:
    """What a snapshot says of a request beside its tokens."""
    known, salt = standing(request), own_salt(request)
    found: dict[str, Any] = {
        "prompt_tokens": known.prompt_tokens if known is not None else len(request.origin_input_ids),
        "finished": finished,
        "sampling": sampling(request.sampling_params),
    }
    if salt is not None:
        found["salt"] = requests.digest(salt)
    if texts := not_carried(request, deterministic=deterministic):
        found["not_carried"] = texts
    return found


def sampling(params: Any) -> dict[str, Any]:
    """The parameters that are set, as a snapshot keeps them."""
    found = {ours: getattr(params, theirs) for ours, theirs in _SAMPLING.items()}
    if params.top_k == 1:  # what SGLang makes of a temperature of nothing
        found["temperature"] = 0.0
    elif params.top_k < _ALL:
        found["top_k"] = params.top_k
    return {
        ours: sorted(value) if isinstance(value, set) else value for ours, value in found.items() if value is not None
    }


def not_carried(request: Any, *, deterministic: bool) -> list[str]:
    """What of a request cannot go on as if it had never stopped."""
    params = request.sampling_params
    structured = (params.json_schema, params.regex, params.ebnf, params.structural_tag)
    found = {
        "structured output: its grammar starts anew": any(text is not None for text in structured),
        "stop texts: one that began before the snapshot is not seen": bool(params.stop_strs or params.stop_regex_strs),
        "logit_bias, custom logit processors: they count if the request that goes on gives them again": bool(
            params.logit_bias or request.custom_logit_processor
        ),
        "draws: without --enable-deterministic-inference SGLang takes no seed": params.top_k != 1 and not deterministic,
    }
    return [text for text, is_so in found.items() if is_so]
