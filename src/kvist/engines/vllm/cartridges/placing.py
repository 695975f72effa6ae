"""What the API process decides on a request, and tells the engine core: the values, and their form on the way.

Knows token ids and names; must not know files, nor vLLM, whose types `kvist.engines.vllm.intake` turns into these.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Self

from kvist.cartridge import placing
from kvist.errors import InvalidInput

KEY: Final = "kvist_cartridge"
"""The field of a request's ``kv_transfer_params`` that says which cartridge it uses. Clients may not give it."""
SALT: Final = placing.SALT
"""What the salt of such a request begins with."""


@dataclass(frozen=True, slots=True)
class Placement:
    """The cartridge of one request.

    Attributes:
        id: as the client or the router named it.
        identity: of its content, hex.
        tokens: its tokens, which stand at the first positions of the request.
        directory: where its files are.
        placed: whether it stands before the prompt. If not, the prompt itself begins with the cartridge's tokens.
        skips: first tokens of the prompt that are left out: the mark of a text's beginning, which is not where the
            prompt stands.
    """

    id: str
    identity: str
    tokens: int
    directory: str
    placed: bool
    skips: int = 0

    def to_marker(self) -> dict[str, Any]:
        """As it travels to the engine core, below `KEY`."""
        return asdict(self)

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Self | None:
        """The placement that a request's ``kv_transfer_params`` carry.

        Raises:
            InvalidInput: what stands there is none of ours.
        """
        marker = (params or {}).get(KEY)
        if marker is None:
            return None
        try:
            return cls(**marker)
        except TypeError as error:
            raise InvalidInput(
                f"kv_transfer_params.{KEY}: expected what kvist's frontend puts there: {error}"
            ) from None

    @property
    def prefix_tokens(self) -> int:
        """Tokens that the engine core puts before the prompt."""
        return self.tokens if self.placed else 0


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
