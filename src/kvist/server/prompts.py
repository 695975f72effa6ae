"""The prompts of a request body as token ids. Knows bodies and tokenizers; must not know engines, HTTP or answers."""

from __future__ import annotations

from kvist.server.errors import BadRequest
from kvist.server.schema import ChatBody, CompletionBody, GenerationBody
from kvist.server.tokenizer import Tokenizer


def prompts_of(tokenizer: Tokenizer | None, body: CompletionBody | ChatBody) -> list[list[int]]:
    """Token ids of each prompt; an empty list where there is no prompt.

    Raises:
        BadRequest: a mixture of texts and ids; text where there is no tokenizer.
    """
    return _of_chat(tokenizer, body) if isinstance(body, ChatBody) else _of_completion(tokenizer, body)


def prompt_field(body: GenerationBody) -> str:
    """Where the body has its prompts."""
    return "messages" if isinstance(body, ChatBody) else "prompt"


def is_text(body: GenerationBody) -> bool:
    """Whether the prompts are texts, to which the tokenizer or the chat template put a beginning."""
    prompt = body.prompt if isinstance(body, CompletionBody) else None
    return isinstance(body, ChatBody) or isinstance(prompt[0] if isinstance(prompt, list) and prompt else prompt, str)


def _of_chat(tokenizer: Tokenizer | None, body: ChatBody) -> list[list[int]]:
    if body.messages is None:
        return [[]]
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; send token ids to /v1/completions", param="messages")
    messages = []
    for message in body.messages:
        entry = {"role": message.role, "content": message.text}
        messages.append(entry | {"name": message.name} if message.name is not None else entry)
    return [tokenizer.chat(messages)]


def _of_completion(tokenizer: Tokenizer | None, body: CompletionBody) -> list[list[int]]:
    prompt = body.prompt
    if prompt is None or prompt == [] or (prompt == "" and _names_a_snapshot(body)):
        return [[]]
    if isinstance(prompt, str):
        return [_encode(tokenizer, body, prompt)]
    ids = [item for item in prompt if isinstance(item, int)]
    if len(ids) == len(prompt):
        return [ids]
    texts = [item for item in prompt if isinstance(item, str)]
    if len(texts) == len(prompt):
        return [_encode(tokenizer, body, text) for text in texts]
    lists = [item for item in prompt if isinstance(item, list)]
    if len(lists) == len(prompt):
        return lists
    raise BadRequest("prompt: expected texts, token ids or lists of token ids, got a mixture", param="prompt")


def _names_a_snapshot(body: CompletionBody) -> bool:
    return body.kv_transfer_params is not None and body.kv_transfer_params.snapshot is not None


def _encode(tokenizer: Tokenizer | None, body: CompletionBody, text: str) -> list[int]:
    if tokenizer is None:
        raise BadRequest("this model has no tokenizer; send token ids", param="prompt")
    return tokenizer.encode(text, special=body.add_special_tokens is not False)
