"""kvist's two messages between SGLang's API process and its scheduler, beside SGLang's own. Knows its base class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang.srt.managers import io_struct
from sglang.utils import TypeBasedDispatcher


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


def answer_calls(scheduler: Any, answer: Callable[[str, dict[str, Any]], dict[str, Any]]) -> None:
    """Let ``answer(op, payload)`` answer the calls that reach a scheduler, in its thread, between two steps."""

    def answered(call: KvistReqInput) -> KvistReqOutput:
        said = answer(call.op, call.payload)
        return KvistReqOutput(number=call.number, answer=said, http_worker_ipc=call.http_worker_ipc)

    scheduler._request_dispatcher += TypeBasedDispatcher([(KvistReqInput, answered)])


def take_answers(manager: Any, take: Callable[[int, dict[str, Any]], None]) -> None:
    """Give ``take(number, answer)`` the answers that reach a tokenizer manager, in its event loop."""

    def taken(message: KvistReqOutput) -> None:
        take(message.number, message.answer)

    manager._result_dispatcher += TypeBasedDispatcher([(KvistReqOutput, taken)])


def call(manager: Any, number: int, op: str, payload: dict[str, Any]) -> None:
    """Send a call; the answer comes as `take_answers` says. In its event loop."""
    manager.auto_create_handle_loop()
    manager._dispatch_to_scheduler(KvistReqInput(number=number, op=op, payload=payload))
