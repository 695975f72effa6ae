"""The snapshots that an engine's requests may continue. Knows sequences and hashes; must not know requests or pages."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from kvist.engines.paged.matching import Checkout, Stored
from kvist.engines.paged.requests import digest
from kvist.errors import NotFound

CHECKOUTS_MAX: Final = 64
"""Snapshots that requests may continue; the one checked out, or named, longest ago goes first."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a request may take.

    Attributes:
        checkout: the snapshot.
        tokens: how many of its tokens.
        stored: the sequence that they are, or ``None``: a chain of blocks.
    """

    checkout: Checkout
    tokens: int
    stored: Stored | None


class Checkouts:
    """See the module.

    Args:
        windows: by group: the tokens that one looks back on, itself included, or ``None``: all.
        size: tokens a page.
    """

    def __init__(self, windows: Sequence[int | None], size: int) -> None:
        self._windows, self._size = windows, size
        self._by_cid: OrderedDict[str, Checkout] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_cid)

    @property
    def cids(self) -> list[str]:
        """Of the snapshots, the next to go first."""
        return list(self._by_cid)

    def add(self, cid: str, content: str, by_hash: list[dict[bytes, int]], sequences: Sequence[Stored]) -> list[str]:
        """Let requests continue a snapshot; see `Checkout`. Returns contents that none can continue any more."""
        self._by_cid[cid] = Checkout(content, by_hash, sequences, self._windows, self._size)
        self._by_cid.move_to_end(cid)
        dropped = []
        while len(self._by_cid) > CHECKOUTS_MAX:
            dropped.append(self._by_cid.popitem(last=False)[1].content)
        kept = {checkout.content for checkout in self._by_cid.values()}
        return [name for name in dropped if name not in kept]

    def content(self, cid: str) -> str:
        """What a snapshot that is checked out holds.

        Raises:
            NotFound: it is not.
        """
        if cid not in self._by_cid:
            raise NotFound(f"snapshot {cid} is not checked out")
        return self._by_cid[cid].content

    def named(self, cid: object, sequence: object, fits: Callable[[Stored], bool]) -> tuple[Checkout, Stored] | None:
        """A snapshot and the sequence of it that a request names; ``None``: there is none that it may continue.

        Args:
            cid, sequence: what the request says, of whatever type.
            fits: whether a sequence is the request's to continue: by its tokens, and the salt that they came under.
        """
        checkout = self._by_cid.get(cid) if isinstance(cid, str) else None
        stored = checkout.sequences.get(sequence) if checkout is not None and isinstance(sequence, str) else None
        if checkout is None or stored is None or not fits(stored):
            return None
        self._by_cid.move_to_end(str(cid))
        return checkout, stored

    def best(
        self, ids: Sequence[int], names: Sequence[bytes], own: str | None, reach: Callable[[Checkout | None], int]
    ) -> Found | None:
        """The snapshot that has the most of what begins a request; ``None``: the engine's prefix cache has more.

        On a tie a snapshot goes before what was computed here, since its pages continue bit for bit.

        Args:
            ids: of the request; at least one of them is left to compute.
            names: block hashes of its full blocks.
            own: the salt that it came with.
            reach: tokens that the prefix cache has for it, as it came (``None``) or under a snapshot's salt.
        """
        best, most = None, reach(None) - 1
        for checkout in self._distinct():
            stored = checkout.longest(ids, digest(own))
            chain = checkout.chain(names, len(ids) - 1)
            if stored is not None and stored.cached < chain:
                stored = None
            tokens = chain if stored is None else stored.cached
            if tokens and (reached := max(tokens, reach(checkout))) > most:
                best, most = Found(checkout, tokens, stored), reached
        return best

    def _distinct(self) -> list[Checkout]:
        """One of each content, the last one first."""
        return list(reversed({checkout.content: checkout for checkout in self._by_cid.values()}.values()))

    def clear(self) -> None:
        """Let no request continue any."""
        self._by_cid.clear()
