"""What the API process decides on a request, and tells the engine core: the values, and their form on the way.

Knows token ids and names; must not know files, nor vLLM, whose types `kvist.engines.vllm.intake` turns into these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Self

from kvist.cartridge import placing
from kvist.cartridge.placing import Prefix
from kvist.errors import InvalidInput

KEY: Final = "kvist_cartridge"
"""The field of a request's ``kv_transfer_params`` that says which cartridge it uses. Clients may not give it."""
SALT: Final = placing.SALT
"""What the salt of such a request begins with."""


@dataclass(frozen=True, slots=True)
class Placement:
    """What the API process decided on one request, and tells the engine core, which looks all of it up again.

    Attributes:
        prefix: the cartridge, and where it stands.
        skips: first tokens of the prompt that are left out: the mark of a text's beginning, which is not where the
            prompt stands; 0 or 1.
    """

    prefix: Prefix
    skips: int = 0

    def to_marker(self) -> dict[str, Any]:
        """As it travels to the engine core, below `KEY`."""
        return {**self.prefix.to_dict(), "skips": self.skips}

    @classmethod
    def of_marker(cls, marker: object) -> Self:
        """The placement that travelled as ``marker``, which may be anything.

        Raises:
            InvalidInput: it is none of ours.
        """
        if not isinstance(marker, Mapping) or type(skips := marker.get("skips")) is not int or skips not in (0, 1):
            raise InvalidInput(f"kv_transfer_params.{KEY}: expected what kvist's front end says, got {marker!r:.200}")
        prefix = Prefix.of_state({"cartridge": {name: marker[name] for name in marker if name != "skips"}})
        assert prefix is not None
        return cls(prefix, skips)


@dataclass(frozen=True, slots=True)
class Standing:
    """The cartridge that a request in the engine core begins with. Made there, and only there: no message carries one.

    Attributes:
        prefix: the cartridge, and where it stands.
        directory: where its files are.
    """

    prefix: Prefix
    directory: str

    @classmethod
    def of(cls, request: Any) -> Self | None:
        """That of vLLM's request, if it has one; what a client wrote in its place is nothing."""
        standing = (request.kv_transfer_params or {}).get(KEY)
        return standing if isinstance(standing, cls) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What of an engine decides which cartridges it can use.

    Attributes:
        max_model_len: tokens of a sequence, those of a cartridge among them.
        vocabulary: tokens that the model knows.
        bos_id: what stands at the beginning of a text, and is left out of one that goes on after a cartridge.
        ranks: of tensor parallelism, among which heads are shared out.
        keeps_all: no layer looks back on a window only, so that all of a cartridge is kept.
        recomputes: what cannot be loaded is computed from token ids, so that only cartridges that have those may be
            used: vLLM's ``kv_load_failure_policy``.
        waits: requests may wait for a disk or a network: there is no event loop that others need.
    """

    max_model_len: int
    vocabulary: int
    bos_id: int | None = None
    ranks: int = 1
    keeps_all: bool = True
    recomputes: bool = False
    waits: bool = True


def check_unmarked(params: object) -> None:
    """Refuse ``kv_transfer_params`` that a client cannot have meant.

    Raises:
        InvalidInput: they say what only kvist may, or have the wrong type.
    """
    if params is not None and not isinstance(params, Mapping):
        raise InvalidInput(f"kv_transfer_params: expected an object, got {params!r:.80}")
    if params and KEY in params:
        raise InvalidInput(f"kv_transfer_params.{KEY}: only kvist itself may set it")


def salt_of(identity: str, own: str | None) -> str:
    """The salt under which requests with one cartridge, and one salt of the client's, share blocks."""
    return placing.salt_of(identity) + (f":{hashlib.sha256(own.encode()).hexdigest()}" if own else "")


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as far as cartridges go.

    Attributes:
        prompt_ids: of the client's prompt; ``None`` where it has none that could be placed.
        extra_args: of the sampling parameters: what the client says under ``kv_transfer_params``, and beside it.
        salt: the client's ``cache_salt``.
        max_tokens: to sample at most; ``None``: as many as there is room for.
        min_tokens: to sample at least.
        needs_prompt: whether all of the prompt must be computed, as for its log probabilities.
        strange: what about it no cartridge can stand before, by name; ``None``: nothing.
        is_text: whether the ids come of a text, to which the tokenizer or the chat template put a beginning.
    """

    prompt_ids: Sequence[int] | None
    extra_args: Mapping[str, Any] | None = None
    salt: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    needs_prompt: bool = False
    strange: str | None = None
    is_text: bool = False


@dataclass(frozen=True, slots=True)
class Placed:
    """What of a request changes because it uses a cartridge.

    Attributes:
        placement: which cartridge, and where.
        salt: under which its blocks are hashed.
        max_tokens: to sample at most: there is room for no more.
    """

    placement: Placement
    salt: str
    max_tokens: int

    def mark(self, extra_args: Mapping[str, Any] | None) -> dict[str, Any]:
        """``extra_args`` with the marker that the engine core looks for."""
        extra = dict(extra_args or {})
        params = extra.get("kv_transfer_params")
        extra["kv_transfer_params"] = {**(params or {}), KEY: self.placement.to_marker()}
        return extra
