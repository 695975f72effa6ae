"""What an operator says of kvist in SGLang: one JSON object in the environment, which all of its processes inherit."""

from __future__ import annotations

import os
from typing import Final, Literal

import msgspec
from msgspec import Struct

from kvist.errors import InvalidInput

VARIABLE: Final = "KVIST_SGLANG"
"""The environment variable."""


class Settings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """See `docs/guides/sglang.md`.

    Attributes:
        store: url of the repository; made if there is none.
        host_bytes: host memory for pages on their way, and for those that stay there.
        tiers: urls of page tiers in front of the store, the nearest first.
        on_lost_pages: what becomes of a request whose pages cannot be had: it ends with an error, or is computed.
        model, revision: what layouts record, if not the directory's name and a digest of its weights.
        tokens: a file of tokens that all routes then ask for.
        trusted_keys: a file of public keys, one of which must have signed what is checked out.
    """

    store: str
    host_bytes: int = 1 << 30
    tiers: tuple[str, ...] = ()
    on_lost_pages: Literal["fail", "compute"] = "fail"
    model: str | None = None
    revision: str | None = None
    tokens: str | None = None
    trusted_keys: str | None = None


def from_environment() -> Settings | None:
    """The settings of this process; ``None``: SGLang runs without kvist.

    Raises:
        InvalidInput: they cannot be read.
    """
    text = os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        found = msgspec.json.decode(text, type=Settings)
    except msgspec.DecodeError as error:
        raise InvalidInput(
            f'{VARIABLE}: expected a JSON object like {{"store": "file:///srv/kv"}}, got {text!r:.120}: {error}'
        ) from None
    if not found.store:
        raise InvalidInput(f"{VARIABLE}: store is the url of a repository, got nothing")
    if found.host_bytes < 1:
        raise InvalidInput(f"{VARIABLE}: host_bytes is a positive number of bytes, got {found.host_bytes}")
    return found
