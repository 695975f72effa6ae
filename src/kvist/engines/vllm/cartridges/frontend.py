"""The API process's side of cartridges: which one a request uses, where it stands, and whether that can be.

Knows the library and the router; must not know vLLM, whose types `kvist.engines.vllm.intake` turns into `Asked`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from kvist.cartridge.config import CartridgeConfig, open_library
from kvist.cartridge.library import Entry, Library
from kvist.cartridge.manifest import CartridgeManifest
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.placing import Prefix, PrefixMode, is_placed, parse_mode, skips
from kvist.cartridge.routing import CartridgeRouter, Selection
from kvist.engines.vllm.cartridges.documents import Documents
from kvist.engines.vllm.cartridges.fields import PREFIX_KEY, check_fields, wanted_mode
from kvist.engines.vllm.cartridges.placing import SALT, Asked, Placed, Placement, Served, check_unmarked, salt_of
from kvist.errors import CartridgeNotReady, InvalidInput, UnknownCartridge
from kvist.pager.sharding import rank_heads

log = logging.getLogger("kvist.vllm")

_ITEM_BYTES: Final = {"bfloat16": 2, "float16": 2, "float32": 4}


class Frontend:
    """Finds the cartridge of every request. Thread-safe.

    Attributes:
        library: what there is.
    """

    def __init__(
        self,
        library: Library,
        router: CartridgeRouter,
        served: Served,
        *,
        prefix: PrefixMode = "auto",
        refuses_unknown: bool = True,
        capacity: Callable[[int], int] | None = None,
        verify: bool = True,
        others: Collection[str] = (),
    ) -> None:
        """Look at what is configured.

        Args:
            library: what there is.
            router: which of it a request uses.
            served: by which engine.
            prefix: where a cartridge stands, unless the request says.
            refuses_unknown: an unknown id is an error; else the request is computed without a cartridge.
            capacity: bytes that each worker keeps cartridges in, given those of the largest that is configured.
            verify: believe token ids that a model may compute from only after the whole cartridge was read.
            others: fields of requests that other connectors read, beside those that are known.

        Raises:
            KvistError: a configured cartridge that no request could use.
        """
        self.library = library
        self._router, self._served = router, served
        self._prefix, self._refuses_unknown, self._others = prefix, refuses_unknown, frozenset(others)
        self._documents = Documents(vocabulary=served.vocabulary, verify=verify and served.recomputes)
        configured = [library.get(cartridge_id) for cartridge_id in library.configured_ids]
        largest = max((self._nbytes(entry.manifest) for entry in configured), default=0)
        self._capacity = None if capacity is None else capacity(largest)
        self._threads = ThreadPoolExecutor(1, thread_name_prefix="kvist-documents")
        self._reading: set[str] = set()
        self._failed: dict[str, Exception] = {}
        self._lock = threading.Lock()
        for entry in configured:
            self._documents.of(entry)
        if not served.waits:
            library.nudge()

    @classmethod
    def open(cls, extra: Mapping[str, Any], model: ModelIdentity, served: Served) -> Frontend:
        """The front end of a connector's ``kv_connector_extra_config``.

        Raises:
            InvalidInput: a configuration that cannot be right.
            KvistError: a cartridge that cannot be had.
        """
        config = CartridgeConfig.from_extra(extra)
        library, router = open_library(config, model)
        try:
            return cls(
                library,
                router,
                served,
                prefix=config.prefix,
                refuses_unknown=config.unknown == "refuse",
                capacity=config.capacity,
                verify=config.verify,
                others=config.other_params,
            )
        except BaseException:
            library.close()
            raise

    def find(self, extra_args: Mapping[str, Any] | None) -> Entry | None:
        """The cartridge that a request uses, by what it says besides its prompt; ``None``: none.

        Raises:
            InvalidInput: it says what only kvist may, what nobody reads, or what has the wrong type.
            UnknownCartridge: there is none of that id.
            LayoutMismatch: it is for another model.
            CartridgeNotReady: it is being opened, or looked for.
        """
        params = (extra_args or {}).get("kv_transfer_params")
        check_unmarked(params)
        check_fields(extra_args, self._router.keys, self._others)
        if self._served.waits:
            self.library.refresh()
        try:
            cartridge_id = self._router.choose(Selection(params, extra_args))
            if cartridge_id is None:
                if wanted_mode(extra_args) is not None:
                    raise InvalidInput(f"{PREFIX_KEY}: goes with a cartridge, and the request uses none")
                return None
            return self.library.get(cartridge_id) if self._served.waits else self.library.ready(cartridge_id)
        except UnknownCartridge as error:
            if self._refuses_unknown:
                raise
            log.warning("computed without a cartridge: %s", error)
            return None

    def look(self, extra_args: Mapping[str, Any] | None) -> None:
        """Have threads open and read what `place` needs.

        Raises:
            CartridgeNotReady: they are at it; ask again.
            KvistError: as `find`; or it cannot be had.
        """
        entry = self.find(extra_args)
        if entry is not None:
            self._document(entry)

    def check(self, entry: Entry) -> None:
        """Whether this engine can use a cartridge at all. Reads its token ids: not for an event loop.

        Raises:
            InvalidInput: it cannot.
            LayoutMismatch: its token ids are not the model's.
            KvistError: it cannot be had.
        """
        self._check(entry)
        self._documents.of(entry)

    def place(self, asked: Asked) -> Placed | None:
        """What of a request changes, if it uses a cartridge.

        Raises:
            InvalidInput: it cannot use the one that it names: too long, or with an option that none can be had with.
            UnknownCartridge, LayoutMismatch: as `find`.
        """
        entry = self.find(asked.extra_args)
        if asked.salt is not None and asked.salt.startswith(SALT):
            raise InvalidInput(f"cache_salt: must not begin with {SALT!r}: that is kvist's own")
        if entry is None:
            return None
        placement = self._placement(entry, asked)
        if asked.needs_prompt:
            raise InvalidInput(
                f"cartridge {entry.cartridge_id!r}: log probabilities of the prompt (prompt_logprobs, echo with "
                "logprobs) cannot be had with a cartridge, whose tokens are not computed"
            )
        return Placed(placement, salt_of(placement.prefix.identity, asked.salt), self._room(placement.prefix, asked))

    def _placement(self, entry: Entry, asked: Asked) -> Placement:
        """The cartridge and where it stands."""
        name, manifest = entry.cartridge_id, entry.manifest
        if asked.strange is not None or asked.prompt_ids is None:
            what = asked.strange or "a prompt without token ids"
            raise InvalidInput(f"cartridge {name!r}: cannot be used with {what}")
        self._check(entry)
        ids = asked.prompt_ids
        placed = is_placed(self._mode(asked.extra_args), self._document(entry), ids)
        begins = placed and asked.is_text and skips(ids, self._served.bos_id)
        return Placement(Prefix(name, manifest.identity, manifest.num_tokens_raw, placed), int(begins))

    def _check(self, entry: Entry) -> None:
        """What the manifest alone tells."""
        name, manifest = entry.cartridge_id, entry.manifest
        if manifest.first_position:
            raise InvalidInput(
                f"cartridge {name!r}: begins at position {manifest.first_position}; only those that begin at 0 can be "
                "put before a prompt"
            )
        if self._served.recomputes and not manifest.has_token_ids:
            raise InvalidInput(
                f"cartridge {name!r}: has no token ids, and cannot be recomputed, as kv_load_failure_policy wants it",
                hint='start vLLM with "kv_load_failure_policy": "fail"',
            )
        nbytes = self._nbytes(manifest)
        if self._capacity is not None and nbytes > self._capacity:
            raise InvalidInput(
                f"cartridge {name!r}: each worker needs {nbytes} bytes for it, and has {self._capacity} for all "
                "cartridges together",
                hint='raise "host_bytes" in kv_connector_extra_config',
            )

    def _nbytes(self, manifest: CartridgeManifest) -> int:
        """Bytes that a worker surely needs: those of its heads; with its pages' padding it is a little more.

        Layers of a window keep fewer, which is known to the workers alone: 0.
        """
        if not self._served.keeps_all:
            return 0
        numbers = sum(
            2 * len(rank_heads(layer.num_kv_heads, self._served.ranks, 0)) * layer.head_dim for layer in manifest.layers
        )
        return manifest.num_tokens_raw * numbers * _ITEM_BYTES[manifest.dtype]

    def _room(self, prefix: Prefix, asked: Asked) -> int:
        """Tokens that may be sampled."""
        prompt, longest = len(asked.prompt_ids or ()), self._served.max_model_len
        room = longest - prefix.own - prompt
        least = max(1, asked.min_tokens)
        if room < least:
            raise InvalidInput(
                f"cartridge {prefix.cartridge_id!r} has {prefix.tokens} tokens, the prompt {prompt}, and at least "
                f"{least} must be sampled: over the maximum of {longest} tokens"
            )
        return room if asked.max_tokens is None else min(asked.max_tokens, room)

    def _mode(self, extra_args: Mapping[str, Any] | None) -> PrefixMode:
        wanted = wanted_mode(extra_args)
        return self._prefix if wanted is None else parse_mode(wanted)

    def _document(self, entry: Entry) -> tuple[int, ...] | None:
        if self._served.waits or self._documents.knows(entry):
            return self._documents.of(entry)
        identity = entry.manifest.identity
        with self._lock:
            if (error := self._failed.pop(identity, None)) is not None:  # the next request tries it again
                raise error
            if identity not in self._reading:
                self._reading.add(identity)
                self._threads.submit(self._read, entry)
        raise CartridgeNotReady(f"cartridge {entry.cartridge_id!r}: its document is being read", hint="try again")

    def _read(self, entry: Entry) -> None:
        identity, error = entry.manifest.identity, None
        try:
            self._documents.of(entry)
        except Exception as reason:  # for who asks next
            error = reason
        with self._lock:
            self._reading.remove(identity)
            if error is not None:
                self._failed[identity] = error
