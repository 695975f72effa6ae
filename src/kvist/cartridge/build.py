"""Making a cartridge by prefill: the keys and values of a text, all of them, as the model computes them.

Knows models and cartridges. Must not know training, engines or registries.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kvist import __version__
from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.causal import CausalModel, Progress
from kvist.cartridge.framing import Framing
from kvist.errors import InvalidInput


def build(
    model: CausalModel | str | Path,
    document: str | Sequence[int],
    *,
    cartridge_id: str,
    is_chat: bool = False,
    max_tokens: int | None = None,
    chunk: int = 512,
    source_document: str = "",
    labels: Mapping[str, str] | None = None,
    license: str = "",
    progress: Progress | None = None,
) -> Cartridge:
    """Prefill a document and keep its keys and values: lossless.

    Args:
        model: or its directory.
        document: text, or ids, which are taken as they are.
        cartridge_id: see `Cartridge.create`; so are ``source_document``, ``labels`` and ``license``.
        is_chat: the text is the system message of the model's chat template, cut where the next message begins.
        max_tokens: refuse a longer one; the model's positions bound it anyway. Nothing is ever cut off to fit.
        chunk: tokens of one forward pass. The bits of a cartridge depend on it, as those of any prefill do.
        progress: is told of every chunk.

    Raises:
        InvalidInput: the document is empty, too long, or cannot be framed.
        UnsupportedModel: see `CausalModel.open`.
    """
    loaded = model if isinstance(model, CausalModel) else CausalModel.open(model)
    if chunk < 1:
        raise InvalidInput(f"chunk must be 1 or more, got {chunk}")
    framing = None
    if isinstance(document, str):
        framing = Framing(loaded.tokenizer, is_chat=is_chat)
        ids = framing.document(document)
    elif is_chat:
        raise InvalidInput("a document of token ids cannot be framed as a chat: give its text")
    else:
        ids = list(document)
    require_length(ids, max_tokens)
    layers = loaded.prefill(ids, chunk=chunk, progress=progress)
    return Cartridge.create(
        layers,
        loaded.identity,
        cartridge_id=cartridge_id,
        token_ids=ids,
        source_document=source_document,
        labels=labels,
        provenance=describe(loaded, framing, document) | {"method": "prefill", "chunk": chunk},
        license=license,
        chat_template_hash=template_hash(framing),
    )


def require_length(ids: Sequence[int], most: int | None) -> None:
    """Refuse a document that is longer than the caller allows.

    Raises:
        InvalidInput: with both lengths.
    """
    if most is not None and len(ids) > most:
        raise InvalidInput(
            f"the document has {len(ids)} tokens, and {most} are allowed; nothing is cut off",
            hint="allow more with --max-tokens, give a shorter text, or distil it: kvist cartridge train",
        )


def describe(model: CausalModel, framing: Framing | None, document: str | Sequence[int]) -> dict[str, Any]:
    """What a cartridge's provenance says of its making, however it was made; JSON."""
    text = document.encode() if isinstance(document, str) else repr(list(document)).encode()
    return {
        "tool": "kvist",
        "version": __version__,
        "prompt": {"kind": "token_ids"} if framing is None else framing.provenance(),
        "document_sha256": hashlib.sha256(text).hexdigest(),
        "numerics": model.numerics(),
    }


def template_hash(framing: Framing | None) -> str | None:
    """``sha256:`` of the chat template, where it framed the document."""
    return None if framing is None or not framing.is_chat else framing.template_hash
