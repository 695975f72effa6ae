"""Completions of a server that speaks OpenAI's API as live engines do: what is asked with every one, and what it says.

Knows that wire format. Must not know processes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final, NamedTuple

import httpx2

from kvist.errors import EngineError

STREAMED: Final = {"stream": True, "stream_options": {"include_usage": True}}
"""Makes a body one of a stream."""

_TOP: Final = 5
"""Log probabilities that are asked for with each token."""


class Step(NamedTuple):
    """One sampled token. Equal steps are equal in every bit.

    Attributes:
        token_id: the token.
        logprob: its log probability.
        top: (token id, log probability) of the likeliest, in the server's order; a server that tells no ids says texts.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int | str, float], ...]


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a completion.

    Attributes:
        id: the server's name for it.
        steps: what was sampled.
        text: the same as text.
        cached_tokens: tokens of the prompt that were not computed.
        prompt_tokens: tokens of the prompt.
        finish_reason: ``"length"``, ``"stop"``, …
        stop_reason: the stop string or token id, or ``None``.
        transfer: ``kv_transfer_params`` of the answer; streams have none.
    """

    id: str
    steps: tuple[Step, ...]
    text: str
    cached_tokens: int
    prompt_tokens: int
    finish_reason: str | None
    stop_reason: int | str | None
    transfer: Mapping[str, Any] | None = None

    @property
    def token_ids(self) -> list[int]:
        """The sampled ids."""
        return [step.token_id for step in self.steps]


class Stream:
    """A completion whose tokens are read while they come, in the background. Safe to be asked from any thread."""

    def __init__(self, http: httpx2.Client, path: str, body: Mapping[str, Any], headers: Mapping[str, str]) -> None:
        self._changed = threading.Condition()
        self._id = ""
        self._steps: list[Step] = []
        self._text: list[str] = []
        self._usage: dict[str, Any] = {}
        self._finish: tuple[str | None, int | str | None] = (None, None)
        self._error: Exception | None = None
        self._done = self._closed = False
        self._thread = threading.Thread(target=self._read, args=(http, path, dict(body), dict(headers)), daemon=True)
        self._thread.start()

    def wait(self, tokens: int) -> list[Step]:
        """What was sampled so far, once that are ``tokens`` or more.

        Raises:
            EngineError: the stream failed, or ended before.
        """
        with self._changed:
            self._changed.wait_for(lambda: len(self._steps) >= tokens or self._done)
            if self._error is not None or len(self._steps) < tokens:
                raise EngineError(f"the stream ended after {len(self._steps)} of {tokens} tokens: {self._error}")
            return list(self._steps)

    def result(self) -> Completion:
        """The whole completion, once it ended.

        Raises:
            EngineError: it failed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._done)
            if self._error is not None:
                raise EngineError(f"the stream failed after {len(self._steps)} tokens: {self._error}")
            return _completion(self._id, self._steps, "".join(self._text), self._usage, *self._finish)

    @property
    def id(self) -> str:
        """The server's name for it; waits for the first token."""
        self.wait(1)
        return self._id

    @property
    def is_live(self) -> bool:
        """Whether the server may still add tokens."""
        with self._changed:
            return not self._done

    def close(self) -> None:
        """Hang up, upon which the server drops the request; and wait until nothing more is read."""
        self._closed = True
        self._thread.join()

    def _read(self, http: httpx2.Client, path: str, body: dict[str, Any], headers: dict[str, str]) -> None:
        try:
            with http.stream("POST", path, json=body, headers=headers) as answer:
                if answer.status_code != 200:
                    raise EngineError(f"POST {path}: status {answer.status_code}: {answer.read().decode()}")
                for line in _lines(answer):
                    if self._closed or line == b"data: [DONE]":
                        break
                    if line:
                        self._take(json.loads(line.removeprefix(b"data: ")))
        except Exception as error:
            self._error = error
        finally:
            with self._changed:
                self._done = True
                self._changed.notify_all()

    def _take(self, event: dict[str, Any]) -> None:
        if "error" in event:
            raise EngineError(f"an error in the stream: {event['error']}")
        with self._changed:
            self._id = event["id"]
            self._usage = event.get("usage") or self._usage
            for choice in event["choices"]:
                self._steps += _steps(choice)
                self._text.append(_text(choice))
                if choice.get("finish_reason"):
                    self._finish = (choice["finish_reason"], choice.get("stop_reason"))
            self._changed.notify_all()


def completion_body(prompt: Sequence[int] | str | None, params: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a completion that tells every token and its log probabilities; ``params`` prevail."""
    body: dict[str, Any] = {"logprobs": _TOP, "return_token_ids": True, "return_tokens_as_token_ids": True, **params}
    if prompt is not None:
        body["prompt"] = prompt if isinstance(prompt, str) else list(prompt)
    return body


def chat_body(messages: Sequence[tuple[str, str]], params: Mapping[str, Any]) -> dict[str, Any]:
    """The body of a chat completion that tells them too; messages are (role, content)."""
    said = [{"role": role, "content": content} for role, content in messages]
    asked = {"logprobs": True, "top_logprobs": _TOP, "return_token_ids": True, "return_tokens_as_token_ids": True}
    return {"messages": said, **asked, **params}


def named(name: str | None) -> dict[str, str]:
    """The header by which a client names its request."""
    return {} if name is None else {"X-Request-Id": name}


def read_answer(answer: httpx2.Response) -> dict[str, Any]:
    """The document of an answer, or raise `EngineError` with what it says, for any status but 200."""
    if answer.status_code != 200:
        raise EngineError(
            f"{answer.request.method} {answer.request.url.path}: status {answer.status_code}: {answer.text}"
        )
    result: dict[str, Any] = answer.json()
    return result


def read_completion(document: dict[str, Any]) -> Completion:
    """A completion that was not streamed."""
    (choice,) = document["choices"]
    reasons = choice["finish_reason"], choice.get("stop_reason")
    whole = _completion(document["id"], _steps(choice), _text(choice), document["usage"], *reasons)
    return replace(whole, transfer=document.get("kv_transfer_params"))


def _lines(answer: httpx2.Response) -> Iterator[bytes]:
    """Lines as server-sent events end them. (`iter_lines` splits at U+0085 in a text too.)"""
    rest = b""
    for data in answer.iter_bytes():
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield line.removesuffix(b"\r")


def _completion(
    name: str,
    steps: Sequence[Step],
    text: str,
    usage: Mapping[str, Any],
    finish_reason: str | None,
    stop_reason: int | str | None,
) -> Completion:
    # vLLM leaves the details out where no token was cached.
    details = usage.get("prompt_tokens_details") or {}
    cached = details.get("cached_tokens") or 0
    return Completion(name, tuple(steps), text, cached, usage.get("prompt_tokens", 0), finish_reason, stop_reason)


def _steps(choice: Mapping[str, Any]) -> list[Step]:
    """The steps of a choice or a chunk of one. JSON gives floats back as they were, to the last bit."""
    ids: list[int] = choice.get("token_ids") or []
    logprobs = choice.get("logprobs") or {}
    if "content" in logprobs:
        content = logprobs["content"] or []
        chosen = [entry["logprob"] for entry in content]
        tops = [[(entry["token"], entry["logprob"]) for entry in place["top_logprobs"]] for place in content]
    else:
        chosen = logprobs.get("token_logprobs") or []
        tops = [list(top.items()) for top in logprobs.get("top_logprobs") or [{}] * len(chosen)]
    if not len(ids) == len(chosen) == len(tops):
        raise EngineError(f"{len(ids)} tokens came with {len(chosen)} log probabilities and {len(tops)} lists of them")
    return [
        Step(token_id, logprob, tuple((_token(token), value) for token, value in top))
        for token_id, logprob, top in zip(ids, chosen, tops, strict=True)
    ]


def _token(said: str) -> int | str:
    """A token's id; its text, where the server says that."""
    return int(said.removeprefix("token_id:")) if said.startswith("token_id:") else said


def _text(choice: Mapping[str, Any]) -> str:
    for key in ("message", "delta"):
        if key in choice:
            return choice[key].get("content") or ""
    return choice.get("text") or ""
