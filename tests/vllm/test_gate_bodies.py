"""A tenant's body against vLLM's own: which fields reach it, and whose sequences a request may name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvist.server.vllm.bodies import _FIELDS

NOT_FOR_TENANTS = {
    "ec_transfer_params", "media_io_kwargs", "mm_payload", "mm_processor_kwargs", "priority", "prompt_embeds",
    "request_id", "return_mm_kwargs", "routed_experts_prompt_start", "session_id",
}  # fmt: skip

_SCRIPT = """
from types import SimpleNamespace
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from kvist.engines.vllm.cartridges.placing import salt_of
from kvist.engines.vllm.connector import _options
from kvist.engines.paged.matching import Stored
from kvist.engines.paged.requests import digest
from kvist.engines.vllm.scheduler import SchedulerSide
from kvist.errors import InvalidInput
from kvist.layout import Layout

ids = list(range(40))
states = {"plain": {}, "salted": {"salt": digest("a")}, "of a cartridge": {
    "salt": digest(salt_of("x", None)), "cartridge": {"identity": "x"}}, "odd": {"salt": digest("a"), "cartridge": 5}}
side = SchedulerSide([Layout(page_size_tokens=16, n_layers=2, n_heads=2, head_dim=8, dtype="f32")], None)
side.check_out("cid", "content", [{}], [Stored(name, ids, 32, [[0, 1]], state) for name, state in states.items()])

def takes(name, salt):
    request = SimpleNamespace(request_id="r", prompt_token_ids=ids, cache_salt=salt, block_hashes=[])
    return side._named(request, {"snapshot": "cid", "sequence": name}) is not None

def is_refused(**options):
    try:
        _options({"store": "memory:", **options})
    except InvalidInput:
        return True
    return False

emit({
    "refused": [is_refused(**each) for each in ({}, {"tokens": "/t"}, {"tokens": ["/t"]}, {"trusted_keys": ["/k"]},
                                                {"tokens": ""}, {"model": 5}, {"store": None})],
    "fields": sorted({*CompletionRequest.model_fields, *ChatCompletionRequest.model_fields}),
    "takes": [[name, salt] for name in states for salt in (None, "a", "b") if takes(name, salt)],
})
"""


@pytest.fixture(scope="module")
def told(run_offline: Callable[..., Any]) -> dict[str, Any]:
    return run_offline(_SCRIPT)  # type: ignore[no-any-return]


def test_every_field_of_vllm_is_decided_on(told: dict[str, Any]) -> None:
    """One of a later version is refused until somebody has looked at it."""
    assert set(told["fields"]) - _FIELDS <= NOT_FOR_TENANTS
    assert not NOT_FOR_TENANTS & _FIELDS


def test_options_that_are_no_text_are_refused(told: dict[str, Any]) -> None:
    """Taken for nothing, a list of tokens files would let everybody in."""
    assert told["refused"] == [False, False, True, True, True, True, True]


def test_a_sequence_is_named_under_its_own_salt(told: dict[str, Any]) -> None:
    assert told["takes"] == [["plain", None], ["salted", "a"], ["of a cartridge", None], ["odd", "a"]]
