"""The API process's side of cartridges: which one a request uses, where it stands, and whether that can be.

Knows the library and the router; must not know vLLM, whose types `kvist.engines.vllm.intake` turns into `Asked`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Final

from kvist.cartridge.config import CartridgeConfig, open_library
from kvist.cartridge.library import Entry, Library
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.placing import PrefixMode, is_placed, parse_mode
from kvist.cartridge.routing import CartridgeRouter, Selection
from kvist.engines.vllm.cartridges.documents import TokenIds
from kvist.engines.vllm.cartridges.placing import KEY, SALT, Asked, Placed, Placement, salt_of
from kvist.errors import InvalidInput, UnknownCartridge

log = logging.getLogger("kvist.vllm")

PREFIX_KEY: Final = "cartridge_prefix"
"""The field of ``kv_transfer_params`` that overrides the configuration's ``prefix``."""


class Frontend:
    """Finds the cartridge of every request. Thread-safe.

    Attributes:
        library: what there is.
    """

    def __init__(
        self,
        library: Library,
        router: CartridgeRouter,
        *,
        max_model_len: int,
        prefix: PrefixMode = "auto",
        refuses_unknown: bool = True,
        recomputes: bool = False,
        bos_id: int | None = None,
    ) -> None:
        """Build it.

        Args:
            library: what there is.
            router: which of it a request uses.
            max_model_len: tokens of a sequence, those of a cartridge among them.
            prefix: where a cartridge stands, unless the request says.
            refuses_unknown: an unknown id is an error; else the request is computed without a cartridge.
            recomputes: what cannot be loaded is computed from token ids, so that only cartridges that have those may
                be used: vLLM's ``kv_load_failure_policy``.
            bos_id: what stands at the beginning of a text, and is left out of one that goes on after a cartridge.
        """
        self.library = library
        self._router = router
        self._max_model_len = max_model_len
        self._prefix = prefix
        self._refuses_unknown = refuses_unknown
        self._recomputes = recomputes
        self._bos_id = bos_id
        self._token_ids = TokenIds()

    @classmethod
    def open(
        cls,
        extra: Mapping[str, Any],
        model: ModelIdentity,
        max_model_len: int,
        *,
        recomputes: bool = False,
        bos_id: int | None = None,
    ) -> Frontend:
        """The front end of a connector's ``kv_connector_extra_config``.

        Raises:
            InvalidInput: a configuration that cannot be right.
            KvistError: a cartridge that cannot be had.
        """
        config = CartridgeConfig.from_extra(extra)
        library, router = open_library(config, model)
        return cls(
            library,
            router,
            max_model_len=max_model_len,
            prefix=config.prefix,
            refuses_unknown=config.unknown == "refuse",
            recomputes=recomputes,
            bos_id=bos_id,
        )

    def find(self, extra_args: Mapping[str, Any] | None) -> Entry | None:
        """The cartridge that a request uses, by what it says besides its prompt; ``None``: none.

        Raises:
            InvalidInput: it says what only kvist may, or what has the wrong type.
            UnknownCartridge: there is none of that id.
            LayoutMismatch: it is for another model.
        """
        params = (extra_args or {}).get("kv_transfer_params")
        if params is not None and not isinstance(params, Mapping):
            raise InvalidInput(f"kv_transfer_params: expected an object, got {params!r:.80}")
        if params and KEY in params:
            raise InvalidInput(f"kv_transfer_params.{KEY}: only kvist itself may set it")
        self.library.refresh()
        try:
            cartridge_id = self._router.resolve(Selection(params, extra_args))
            return None if cartridge_id is None else self.library.get(cartridge_id)
        except UnknownCartridge as error:
            if self._refuses_unknown:
                raise
            log.warning("computed without a cartridge: %s", error)
            return None

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
                f"cartridge {placement.id!r}: log probabilities of the prompt (prompt_logprobs, echo with logprobs) "
                "cannot be had with a cartridge, whose tokens are not computed"
            )
        return Placed(placement, salt_of(placement.identity, asked.salt), self._room(placement, asked))

    def _placement(self, entry: Entry, asked: Asked) -> Placement:
        """The cartridge and where it stands."""
        name, manifest = entry.cartridge_id, entry.manifest
        if asked.strange is not None or asked.prompt_ids is None:
            what = asked.strange or "a prompt without token ids"
            raise InvalidInput(f"cartridge {name!r}: cannot be used with {what}")
        if manifest.first_position:
            raise InvalidInput(
                f"cartridge {name!r}: begins at position {manifest.first_position}; only those that begin at 0 can be "
                "put before a prompt"
            )
        if self._recomputes and not manifest.has_token_ids:
            raise InvalidInput(
                f"cartridge {name!r}: has no token ids, and cannot be recomputed, as kv_load_failure_policy wants it",
                hint='start vLLM with "kv_load_failure_policy": "fail"',
            )
        ids = asked.prompt_ids
        placed = is_placed(self._mode(asked.extra_args), self._document(entry), ids)
        begins = placed and asked.is_text and len(ids) > 1 and ids[0] == self._bos_id
        return Placement(name, manifest.identity, manifest.num_tokens_raw, str(entry.directory), placed, int(begins))

    def _room(self, placement: Placement, asked: Asked) -> int:
        """Tokens that may be sampled."""
        prompt = len(asked.prompt_ids or ())
        room = self._max_model_len - placement.prefix_tokens - prompt
        least = max(1, asked.min_tokens)
        if room < least:
            raise InvalidInput(
                f"cartridge {placement.id!r} has {placement.tokens} tokens, the prompt {prompt}, and at least {least} "
                f"must be sampled: over the maximum of {self._max_model_len} tokens"
            )
        return room if asked.max_tokens is None else min(asked.max_tokens, room)

    def _mode(self, extra_args: Mapping[str, Any] | None) -> PrefixMode:
        wanted = Selection((extra_args or {}).get("kv_transfer_params"), extra_args).value(PREFIX_KEY)
        return self._prefix if wanted is None else parse_mode(wanted)

    def _document(self, entry: Entry) -> tuple[int, ...] | None:
        if not entry.manifest.has_token_ids:
            return None
        return self._token_ids.of(entry.manifest.identity, entry.directory)
