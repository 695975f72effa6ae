"""Answers in OpenAI's two shapes, whole and in chunks. Knows JSON and pieces; must not know engines or HTTP."""

from __future__ import annotations

import base64
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from kvist.server.generation import Piece
from kvist.server.tokenizer import Tokenizer


@dataclass(slots=True, kw_only=True)
class Answer(ABC):
    """What all chunks of one answer have in common.

    Attributes:
        id, created, model, fingerprint: as sent.
        tokenizer: for the text of single tokens.
        prompts: ids before the first generated one, by choice.
        logprobs: whether to tell log probabilities.
        token_ids: whether to send ids.
        names_ids: whether log probabilities call a token ``token_id:<id>``, in place of its text.
        logits: whether to send rows of logits.
        echo: text to put before each choice's own, by choice; empty: none.
        transfer: what to tell as ``kv_transfer_params``, in the whole answer or the first chunk; empty: nothing.
    """

    id: str
    created: int
    model: str
    fingerprint: str
    tokenizer: Tokenizer | None
    prompts: Sequence[Sequence[int]]
    logprobs: bool = False
    token_ids: bool = False
    names_ids: bool = False
    logits: bool = False
    echo: Sequence[str] = ()
    transfer: Mapping[str, Any] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    _has_told: bool = False

    whole: ClassVar[str]
    part: ClassVar[str]

    def document(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
        """The whole answer."""
        return self._frame(self.whole, choices) | {"usage": usage} | self._told() | more

    def chunk(self, choices: list[dict[str, Any]], **usage: Any) -> dict[str, Any]:
        """One event of a stream."""
        return self._frame(self.part, choices) | usage | self._told()

    def _told(self) -> dict[str, Any]:
        """What is told of the cartridge, the first time."""
        is_new, self._has_told = not self._has_told, True
        return {"kv_transfer_params": self.transfer} if self.transfer and is_new else {}

    def is_worth_sending(self, piece: Piece) -> bool:
        """Whether a chunk for ``piece`` would say anything."""
        told = self.logprobs or self.token_ids or self.logits
        return bool(piece.text or piece.finish_reason or (told and piece.steps) or piece.index not in self._opened)

    def choice(self, piece: Piece, *, stream: bool) -> dict[str, Any]:
        """The choice, or its next part; the first part of each carries what comes only once."""
        first = piece.index not in self._opened
        self._opened.add(piece.index)
        choice: dict[str, Any] = {"index": piece.index, "finish_reason": piece.finish_reason}
        choice |= self._content(piece, first, stream)
        if self.token_ids:
            if first:
                choice["prompt_token_ids"] = list(self.prompts[piece.index])
            choice["token_ids"] = [step.token_id for step in piece.steps]
        if self.logits:
            rows = [step.logits for step in piece.steps if step.logits is not None]
            data = b"".join(row.astype("<f4").tobytes() for row in rows)
            shape = [len(rows), len(rows[0]) if rows else 0]
            choice["kvist"] = {"logits": base64.b64encode(data).decode(), "shape": shape}
        return choice

    @abstractmethod
    def _content(self, piece: Piece, first: bool, stream: bool) -> dict[str, Any]:
        """What a choice says."""

    def _frame(self, kind: str, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _bytes(self, token: int) -> bytes:
        return self.tokenizer.piece(token) if self.tokenizer is not None else b""


class CompletionAnswer(Answer):
    """``text_completion``."""

    whole = part = "text_completion"

    def _content(self, piece: Piece, first: bool, stream: bool) -> dict[str, Any]:
        echo = self.echo[piece.index] if self.echo else ""
        text = echo + piece.text if first else piece.text
        return {"text": text, "logprobs": self._logprobs(piece) if self.logprobs else None}

    def _logprobs(self, piece: Piece) -> dict[str, Any]:
        tops = [{**dict(step.top), step.token_id: step.logprob} for step in piece.steps]
        return {
            "tokens": [self._name(step.token_id) for step in piece.steps],
            "token_logprobs": [step.logprob for step in piece.steps],
            "top_logprobs": [{self._name(token): logprob for token, logprob in top.items()} for top in tops],
            "text_offset": list(piece.offsets),
        }

    def _name(self, token: int) -> str:
        """The token's text; one that is no text of its own by its bytes, and one without bytes by its id."""
        data = b"" if self.names_ids else self._bytes(token)
        try:
            return data.decode() if data else f"token_id:{token}"
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class ChatAnswer(Answer):
    """``chat.completion``."""

    whole, part = "chat.completion", "chat.completion.chunk"

    def _content(self, piece: Piece, first: bool, stream: bool) -> dict[str, Any]:
        logprobs = {"content": [self._entry(step) for step in piece.steps]} if self.logprobs else None
        if not stream:
            return {"message": {"role": "assistant", "content": piece.text, "refusal": None}, "logprobs": logprobs}
        delta: dict[str, Any] = {"role": "assistant", "content": piece.text} if first else {"content": piece.text}
        return {"delta": delta if first or piece.text else {}, "logprobs": logprobs}

    def _entry(self, step: Any) -> dict[str, Any]:
        tops = [self._one(token, logprob) for token, logprob in step.top]
        return self._one(step.token_id, step.logprob) | {"top_logprobs": tops}

    def _one(self, token: int, logprob: float) -> dict[str, Any]:
        data = self._bytes(token)
        text = f"token_id:{token}" if self.names_ids else data.decode(errors="replace")
        return {"token": text, "logprob": logprob, "bytes": list(data)}
