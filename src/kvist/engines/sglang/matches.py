"""What a request that arrives may take of the snapshots that are checked out.

Knows token ids, salts, and how far SGLang's prefix cache goes; must not know slots, nor how pages come.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from kvist.engines.paged.checkouts import Checkouts
from kvist.engines.paged.matching import Checkout, Stored, starts_with
from kvist.engines.paged.requests import digest
from kvist.engines.sglang import internals, requests
from kvist.hashing import extend_block_hashes

log = logging.getLogger("kvist.sglang")


@dataclass(frozen=True, slots=True)
class Match:
    """What one request takes.

    Attributes:
        checkout: the snapshot.
        tokens: how many of its tokens.
        refs: the manifest's page of each page of them, in order.
        stored: the sequence that they are, or ``None``: a chain of blocks.
        names: of the pages, as far as they are full.
    """

    checkout: Checkout
    tokens: int
    refs: list[int]
    stored: Stored | None
    names: list[bytes]


class Matches:
    """See the module."""

    def __init__(self, tree: Any, checkouts: Checkouts, size: int) -> None:
        """
        Args:
            tree: SGLang's prefix cache.
            checkouts: what requests may continue.
            size: tokens of a page.
        """
        self._tree, self._checkouts, self._size = tree, checkouts, size

    def of(self, request: Any) -> Match | None:
        """What a request takes; ``None``: nothing."""
        wanted = requests.wanted(request)
        return self._best(request) if wanted is None else self._named(request, *wanted)

    def _named(self, request: Any, cid: str, name: str) -> Match | None:
        """The sequence that the request names, if it came with its salt; the API process has checked that it fits."""
        salt, ids = digest(requests.own_salt(request)), list(request.origin_input_ids)

        def fits(stored: Stored) -> bool:
            return stored.state.get("salt") == salt and starts_with(ids, stored)

        found = self._checkouts.named(cid, name, fits)
        if found is None:
            log.warning("request %s names a sequence that it cannot continue; it is computed", request.rid)
            return None
        return self._taking(*found, ids) if found[1].cached else None

    def _best(self, request: Any) -> Match | None:
        """The longest of what the prefix cache and the snapshots have for a request; ``None``: the former's."""
        ids, own = list(request.origin_input_ids), requests.own_salt(request)
        names: list[bytes] = []
        extend_block_hashes(names, ids, self._size, salt=digest(own) or "")

        def reach(checkout: Checkout | None) -> int:
            salt = request.cache_salt if checkout is None else checkout.salt(own)
            return internals.match(self._tree, ids[:-1], request.extra_key, salt)[0]

        found = self._checkouts.best(ids, names, own, reach)
        if found is None:
            return None
        if found.stored is not None:
            return self._taking(found.checkout, found.stored, ids)
        taken = names[: found.tokens // self._size]
        return Match(found.checkout, found.tokens, [found.checkout.by_hash[0][name] for name in taken], None, taken)

    def _taking(self, checkout: Checkout, stored: Stored, ids: list[int]) -> Match:
        names: list[bytes] = []
        extend_block_hashes(names, ids[: stored.cached], self._size, salt=stored.state.get("salt", ""))
        refs = [ref for ref in stored.pages[0] if ref is not None]
        return Match(checkout, stored.cached, refs, stored, names)
