"""From a request body to what each choice will say: it is decided, text and all, before the engine hears of it.

Knows bodies, the tokenizer and how answers are drawn. Must not know HTTP. May take long, so it is called in a thread.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvist.engines.mock import Answer, MockEngine, draw_answer
from kvist.errors import NotFound
from kvist.server.errors import BadRequest
from kvist.server.mock.bodies import MockBody, MockChatBody
from kvist.server.prompts import prompt_field, prompts_of
from kvist.server.text import Detokenizer, StopStrings
from kvist.server.tokenizer import Tokenizer

_CHOICES_MAX: Final = 1024
_COMPLETION_TOKENS: Final = 16
"""vLLM's default for completions; a chat goes on as long as there is room."""


class NoSuchModel(NotFound):
    """The server has another model.

    Attributes:
        param: the field concerned.
    """

    param = "model"


@dataclass(frozen=True, slots=True, kw_only=True)
class Voice:
    """What decides an answer beside the request.

    Attributes:
        name: what clients call the model.
        tokenizer: text to ids and back.
        vocabulary: ids to draw from.
        seed: of requests that have none.
        mean_tokens: expected length of answers that end by themselves; ``None``: none does.
    """

    name: str
    tokenizer: Tokenizer
    vocabulary: Sequence[int]
    seed: int = 0
    mean_tokens: float | None = None

    def text(self, ids: Sequence[int]) -> str:
        """Text of ``ids``; those that stand for nothing are left out."""
        return self.tokenizer.decode(ids)


@dataclass(frozen=True, slots=True)
class Choice:
    """One sequence to generate.

    Attributes:
        prompt: token ids.
        answer: for the engine.
        texts: what each token adds to the text, at its time.
        stop_reason: the stop string or token id that ends it, as vLLM tells.
    """

    prompt: Sequence[int]
    answer: Answer
    texts: Sequence[str]
    stop_reason: str | int | None


@dataclass(frozen=True, slots=True)
class Speech:
    """All choices of a request, those of one prompt together, and how many prompts."""

    choices: list[Choice]
    prompts: int


def make_speech(voice: Voice, engine: MockEngine, body: MockBody) -> Speech:
    """Decide what each choice says.

    Raises:
        NoSuchModel: the body names another.
        BadRequest: naming the field.
    """
    if body.model is not None and body.model != voice.name:
        raise NoSuchModel(f"The model `{body.model:.200}` does not exist.")
    prompts = prompts_of(voice.tokenizer, body)
    n = body.n or 1
    if n * len(prompts) > _CHOICES_MAX:
        raise BadRequest(f"n: expected at most {_CHOICES_MAX} choices in all, got {n * len(prompts)}", param="n")
    limits = [_limit(engine.max_model_len, body, prompt) for prompt in prompts]
    pairs = zip(prompts, limits, strict=True)
    return Speech([_choose(voice, engine, body, *pair, i) for pair in pairs for i in range(n)], len(prompts))


def _limit(longest: int, body: MockBody, prompt: Sequence[int]) -> int:
    """Tokens that the answer may have, by vLLM's rules."""
    if not prompt:
        raise BadRequest("The decoder prompt cannot be empty", param=prompt_field(body))
    if len(prompt) > longest:
        raise BadRequest(
            f"This model's maximum context length is {longest} tokens. However, your prompt contains {len(prompt)} "
            "input tokens, which exceeds this limit even without any output tokens. Please reduce the length of the "
            "input prompt.",
            param="input_tokens",
        )
    if len(prompt) == longest:
        raise BadRequest(
            f"The decoder prompt (length {longest}) plus the number of requested output tokens (at least 1) is longer "
            f"than the maximum model length of {longest}. Make sure that `max_model_len` is no smaller than the number "
            "of text tokens (prompt + requested output tokens)."
        )
    wanted, param = body.max_tokens, "max_tokens"
    if isinstance(body, MockChatBody) and body.max_completion_tokens is not None:
        wanted, param = body.max_completion_tokens, "max_completion_tokens"
    if wanted is not None and wanted < 1:
        raise BadRequest(f"{param} must be at least 1, got {wanted}.", param=param)
    if wanted is not None and wanted > longest:
        raise BadRequest(
            f"{param}={wanted} cannot be greater than max_model_len={longest}. Please request fewer output tokens.",
            param=param,
        )
    room = longest - len(prompt)
    default = room if isinstance(body, MockChatBody) else _COMPLETION_TOKENS
    limit = min(room, default if wanted is None else wanted)
    if body.min_tokens > (limit if wanted is None else wanted):
        raise BadRequest(f"min_tokens must be at most {param}={limit}, got {body.min_tokens}.", param="min_tokens")
    return limit


def _choose(voice: Voice, engine: MockEngine, body: MockBody, prompt: list[int], limit: int, number: int) -> Choice:
    end = None if body.ignore_eos else voice.tokenizer.special_id("eos_token")
    tokens = draw_answer(
        prompt,
        voice.vocabulary,
        seed=(voice.seed if body.seed is None else body.seed) + number,
        limit=limit,
        mean=voice.mean_tokens,
        least=body.min_tokens + 1,
        end=end,
    )
    stop_ids = set(body.stop_token_ids or ())
    ends = [at for at, token in enumerate(tokens) if token in stop_ids and at >= body.min_tokens] if stop_ids else []
    if ends:
        tokens = tokens[: ends[0] + 1]
    by_token = bool(ends) or tokens[-1] == end
    texts, said = _say(voice, prompt, tokens, by_token, body)
    reason: str | int | None = said
    if said is None and ends:
        reason = tokens[-1]
    finish = "stop" if said is not None or by_token else "length"
    return Choice(prompt, engine.answer(prompt, tokens[: len(texts)], finish), texts, reason)


def _say(
    voice: Voice, prompt: Sequence[int], tokens: Sequence[int], ends_by_token: bool, body: MockBody
) -> tuple[list[str], str | None]:
    """What each token adds to the text, up to a stop string, and that string."""
    text, stops = Detokenizer(voice.text, prompt), StopStrings(body.stops)
    texts: list[str] = []
    for count, token in enumerate(tokens, start=1):
        is_last = count == len(tokens)
        # The token that ends an answer is not part of its text.
        new = "" if is_last and ends_by_token else text.push(token)
        if is_last:
            new += text.flush()
        texts.append(stops.push(new) if count > body.min_tokens else new)
        if stops.found is not None:
            return texts, stops.found
    texts[-1] += stops.flush()
    return texts, None
