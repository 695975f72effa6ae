"""The tokenizer of a model directory: text to ids, ids to text and bytes, chats to prompts.

Knows ``tokenizer.json``, ``tokenizer_config.json`` and chat templates (Jinja, sandboxed; nothing from the directory is
run as Python). Must not know engines, HTTP or transformers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as _Backend

from kvist.errors import InvalidInput
from kvist.server.errors import BadRequest

_BYTE_TOKEN: Final = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIALS: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """Text to ids and back, as transformers' fast tokenizers do it."""

    def __init__(self, backend: _Backend, config: dict[str, Any], template: str | None) -> None:
        self._backend = backend
        self._config = config
        self._template = template
        self.piece = lru_cache(maxsize=65536)(self._piece)

    @classmethod
    def load(cls, directory: str | Path) -> Tokenizer | None:
        """The tokenizer in ``directory``; ``None`` where there is none: then only token ids can be sent.

        Raises:
            InvalidInput: its files cannot be read.
        """
        path = Path(directory)
        if not (path / "tokenizer.json").is_file():
            return None
        try:
            backend = _Backend.from_file(str(path / "tokenizer.json"))
            settings = path / "tokenizer_config.json"
            config = json.loads(settings.read_text()) if settings.is_file() else {}
            template = config.get("chat_template")
            if (path / "chat_template.jinja").is_file():
                template = (path / "chat_template.jinja").read_text()
        except Exception as error:  # tokenizers raises bare Exception
            raise InvalidInput(f"the tokenizer in {str(path)!r} cannot be read: {error}") from error
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, config, template)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of ``text``; with ``special``, those that the tokenizer adds around it too."""
        return list(self._backend.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: Sequence[int], *, special: bool = False) -> str:
        """Text of ``ids``, without special tokens unless ``special``; U+FFFD where bytes are no character."""
        return str(self._backend.decode(list(ids), skip_special_tokens=not special))

    def _piece(self, token: int) -> bytes:
        """The bytes that one id stands for, wherever it comes in a text; none for an id without a token."""
        content = self._backend.id_to_token(token)
        if content is None:
            return b""
        if token in self._added:
            return str(content).encode()
        if self._is_byte_level:
            table = bytes_of_letters()
            return b"".join(bytes([table[letter]]) if letter in table else letter.encode() for letter in content)
        byte = _BYTE_TOKEN.fullmatch(content)
        return bytes([int(byte[1], 16)]) if byte else content.replace("\u2581", " ").encode()

    @cached_property
    def _added(self) -> frozenset[int]:
        return frozenset(self._backend.get_added_tokens_decoder())

    @cached_property
    def _is_byte_level(self) -> bool:
        decoder = json.loads(self._backend.to_str()).get("decoder") or {}
        return any(part.get("type") == "ByteLevel" for part in (decoder, *decoder.get("decoders", ())))

    def chat(self, messages: Sequence[dict[str, Any]]) -> list[int]:
        """Ids of a chat by the model's own template, ready for the assistant's answer.

        Raises:
            BadRequest: the model has no template, or its template refuses the messages.
        """
        if self._compiled is None:
            raise BadRequest("this model has no chat template; use /v1/completions", param="messages")
        specials = {name: self._special(name) for name in _SPECIALS}
        try:
            text = self._compiled.render(messages=messages, tools=None, documents=None, add_generation_prompt=True,
                                         **specials)  # fmt: skip
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            raise BadRequest(f"the model's chat template refuses these messages: {error}", param="messages") from error
        return self.encode(text, special=False)

    @cached_property
    def _compiled(self) -> Any:
        if self._template is None:
            return None
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        try:
            return environment.from_string(self._template)
        except TemplateError as error:
            raise InvalidInput(f"the model's chat template cannot be read: {error}") from error

    def special_id(self, name: str) -> int | None:
        """Id of the special token that the configuration calls so (``eos_token``), if there is one."""
        found: int | None = self._backend.token_to_id(self._special(name))
        return found

    @property
    def ids(self) -> range:
        """All ids that may stand for something."""
        return range(self._backend.get_vocab_size(with_added_tokens=True))

    def _special(self, name: str) -> str:
        token = self._config.get(name) or ""
        return str(token.get("content", "")) if isinstance(token, dict) else str(token)


class _Generation(Extension):
    """``{% generation %}`` marks the assistant's words for training; here it just shows them."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's own attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **_: Any) -> str:
    # Jinja's own filter escapes HTML, which no model was trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise(message: str) -> NoReturn:
    raise TemplateError(message)


@lru_cache(maxsize=1)
def bytes_of_letters() -> dict[str, int]:
    """GPT-2's letters for bytes, reversed: printable Latin-1 stands for itself, the rest for U+0100 and on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}
