"""kvist's two messages between SGLang's API process and its scheduler, beside SGLang's own. Knows its base class."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import io_struct


class KvistReqInput(io_struct.BaseReq, kw_only=True):  # type: ignore[call-arg]  # msgspec's
    """A call.

    Attributes:
        number: of the call; the answer has it too.
        op: its name.
        payload: its arguments, plain values.
    """

    number: int
    op: str
    payload: dict[str, Any]


class KvistReqOutput(io_struct.BaseReq, kw_only=True):  # type: ignore[call-arg]
    """The answer to a call.

    Attributes:
        number: of the call.
        answer: plain values; an error comes as one.
    """

    number: int
    answer: dict[str, Any]


def register() -> None:
    """Let SGLang's decoder know them. To be called in every process, before anything is received. Idempotent."""
    io_struct.hook_custom_types(KvistReqInput, KvistReqOutput)
