"""The token ids of cartridges' documents, and what stands for a cartridge before a prompt. Knows cartridges' files."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from kvist.cartridge.library import Entry, Library
from kvist.cartridge.manifest_file import read_manifest
from kvist.cartridge.reading import open_layers
from kvist.engines.vllm.cartridges.placing import Placement, Standing
from kvist.errors import DamagedCartridge, InvalidInput, LayoutMismatch

_KEPT: Final = 256
"""Cartridges whose token ids are kept."""


class Documents:
    """The token ids of cartridges that have them, by identity; read once and kept. Thread-safe."""

    def __init__(self, *, vocabulary: int, verify: bool) -> None:
        """Read nothing yet.

        Args:
            vocabulary: tokens that the model knows; ids are below it.
            verify: read the cartridge whole before its ids are believed, as must be where a model computes from them:
                the checksum is of all its content.
        """
        self._vocabulary, self._verify = vocabulary, verify
        self._kept: OrderedDict[str, tuple[int, ...]] = OrderedDict()
        self._lock = threading.Lock()

    def knows(self, entry: Entry) -> bool:
        """Whether `of` reads nothing."""
        return not entry.manifest.has_token_ids or entry.manifest.identity in self._kept

    def of(self, entry: Entry) -> tuple[int, ...] | None:
        """The ids of the document, or ``None``: the cartridge does not say, or was trained.

        Raises:
            LayoutMismatch: ids that the model does not know.
            DamagedCartridge: the directory holds another cartridge by now, or other ids than it should.
            KvistError: it holds none.
        """
        identity = entry.manifest.identity
        if not entry.manifest.has_token_ids:
            return None
        with self._lock:
            if identity in self._kept:
                self._kept.move_to_end(identity)
                return self._kept[identity]
        manifest = read_manifest(entry.directory, identity)
        with open_layers(entry.directory, manifest) as layers:
            if self._verify:
                layers.check()
            ids = layers.token_ids
        assert ids is not None
        if max(ids) >= self._vocabulary:
            raise LayoutMismatch(
                f"cartridge {entry.cartridge_id!r}: its document has the token id {max(ids)}, the vocabulary of the "
                f"served model {self._vocabulary} tokens",
                hint="it was made with another tokenizer",
            )
        with self._lock:
            self._kept[identity] = ids
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
        return ids


class Prefixes:
    """In the engine core: the cartridges that requests begin with, and the token ids that stand for them. Thread-safe.

    What arrives with a request is only compared: what a cartridge is, and where, the engine core knows from its own
    configuration and registry. Whoever can write to it otherwise than through kvist's front end (vLLM's own
    notifications, another front end) gets no more than a front end would have given him.
    """

    def __init__(self, library: Library, documents: Documents, *, max_model_len: int, placeholder: int) -> None:
        """Read the documents of configured cartridges.

        Args:
            library: what there is; borrowed.
            documents: their token ids.
            max_model_len: tokens of a sequence.
            placeholder: stands for a token without an id; nothing is ever computed from it.

        Raises:
            KvistError: a configured cartridge that cannot be had.
        """
        self._library, self._documents = library, documents
        self._max_model_len, self._placeholder = max_model_len, placeholder
        for cartridge_id in library.configured_ids:
            documents.of(library.get(cartridge_id))

    def of(self, marker: object, prompt: Sequence[int], salt: str | None) -> tuple[Standing, list[int]]:
        """The cartridge of a request, and the token ids of the request with it.

        Placed are its document's ids where the cartridge has them, so that what looks at a prompt's tokens (a penalty,
        a recomputation) sees the text; otherwise the placeholder.

        Args:
            marker: what came with the request; may be anything.
            prompt: its token ids, the client's.
            salt: under which its blocks will be hashed.

        Raises:
            InvalidInput: the marker is none of ours, or does not go with the prompt or the salt.
            DamagedCartridge: there is no cartridge of this content under this id.
            KvistError: it cannot be had.
        """
        placement = Placement.of_marker(marker)
        prefix = placement.prefix
        entry = self._entry(prefix.cartridge_id, prefix.identity)
        if prefix.tokens != entry.manifest.num_tokens_raw or entry.manifest.first_position:
            raise InvalidInput(f"cartridge {prefix.cartridge_id!r:.120}: it has not {prefix.tokens} tokens from 0 on")
        if salt != prefix.salt and not str(salt).startswith(f"{prefix.salt}:"):
            raise InvalidInput(f"cartridge {prefix.cartridge_id!r:.120}: expected the salt {prefix.salt}, got {salt!r}")
        length = prefix.own + len(prompt) - placement.skips
        if not prefix.own < length < self._max_model_len:  # before anything is made of a length
            raise InvalidInput(
                f"cartridge {prefix.cartridge_id!r:.120}: {length} tokens with the prompt's {len(prompt)}, of at most "
                f"{self._max_model_len}"
            )
        document = self._documents.of(entry)
        if prefix.placed:
            stands = [self._placeholder] * prefix.tokens if document is None else list(document)
            ids = [*stands, *prompt[placement.skips :]]
        else:
            ids = list(prompt)
            if document is None or tuple(ids[: prefix.tokens]) != document:
                raise InvalidInput(
                    f"cartridge {prefix.cartridge_id!r:.120}: the prompt does not begin with its document"
                )
        return Standing(prefix, str(entry.directory)), ids

    def _entry(self, cartridge_id: str, identity: str) -> Entry:
        entry = self._library.get(cartridge_id)
        if entry.manifest.identity != identity:  # replaced since the registry was read here, or there
            self._library.refresh()
            entry = self._library.get(cartridge_id)
        if entry.manifest.identity != identity:
            raise DamagedCartridge(
                f"cartridge {cartridge_id!r:.120}: expected the content {identity:.80}, got {entry.manifest.identity}"
            )
        return entry
