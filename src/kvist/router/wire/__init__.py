"""Wire forms of KV events: vLLM's and SGLang's ZeroMQ batches, and Dynamo's JSON. Bytes to values and back."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from kvist.errors import InvalidInput
from kvist.router.wire import sglang, vllm
from kvist.router.wire.base import Batch, BlockEvent, Codec, from_event, to_event

CODECS: Final[Mapping[str, Codec]] = MappingProxyType({"vllm": vllm, "sglang": sglang})
"""The forms of batches, by the engine that speaks them."""


def codec(name: str) -> Codec:
    """The form of that name.

    Raises:
        InvalidInput: there is none.
    """
    if name not in CODECS:
        raise InvalidInput(f"codec must be one of {', '.join(CODECS)}; got {name!r}")
    return CODECS[name]


__all__ = ["CODECS", "Batch", "BlockEvent", "Codec", "codec", "from_event", "to_event"]
