"""What a request may take from a snapshot or from the durable prefix cache. Pure: token ids and hashes in, tokens out.

Two ways to match. A *sequence* of a snapshot is a list of token ids with the pages of all its computed tokens, the
partly filled last one included: a request that starts with these tokens takes them all. Any *block* is known by its
block hash: a request takes the longest chain of full blocks from its start.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kvist.layout import Layout

Has = Callable[[int, bytes], bool]
"""Whether a KV cache group's page of a block hash can be had."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A sequence of a snapshot.

    Attributes:
        id: its name there.
        token_ids: all of them.
        cached: tokens whose KV its pages hold.
        pages: by group, by block: the page's ``ix``, or ``None`` where it is out of the window.
        state: what else it takes to go on.
    """

    id: str
    token_ids: list[int]
    cached: int
    pages: list[list[int | None]]
    state: Mapping[str, Any] = field(default_factory=dict)


def chain_tokens(hashes: Sequence[bytes], limit: int, size: int, windows: Sequence[int | None], has: Has) -> int:
    """Tokens of the longest chain of full blocks that every group can go on from.

    A group of full attention needs every block; one with a sliding window those that the next token looks back on.

    Args:
        hashes: the request's block hashes.
        limit: most tokens.
        size: tokens a block.
        windows: by group: tokens that one looks back on, itself included, or ``None``: all.
        has: which pages there are.
    """
    most = min(len(hashes), limit // size)
    for group, window in enumerate(windows):
        if window is None:
            most = next((n for n in range(most) if not has(group, hashes[n])), most)
    while most > 0:
        missing = [
            n
            for group, window in enumerate(windows)
            if window is not None
            for n in range(first_block(most * size, window, size), most)
            if not has(group, hashes[n])
        ]
        if not missing:
            break
        most = max(missing)
    return most * size


def first_block(tokens: int, window: int | None, size: int) -> int:
    """The first block that the token after ``tokens`` tokens looks back on."""
    return 0 if window is None else max(0, tokens - window + 1) // size


def blocks_of(tokens: int, local: int, windows: Sequence[int | None], size: int) -> Iterator[tuple[int, int]]:
    """Group and number of each block that a request which takes ``tokens`` tokens needs beyond its first ``local``."""
    for group, window in enumerate(windows):
        for number in range(max(local // size, first_block(tokens, window, size)), -(-tokens // size)):
            yield group, number


def window_of(layout: Layout) -> int | None:
    """Tokens that one looks back on in the layers of a layout, itself included, or ``None``: all."""
    kind, _, window = layout.attention.partition(":")
    return int(window) if kind == "sliding" else None


class Checkout:
    """A snapshot that requests may continue.

    Attributes:
        content: what it holds, by a digest of its manifests; forks of one snapshot have one.
        by_hash: by group: page ``ix`` by block hash.
        sequences: by id.
    """

    def __init__(
        self,
        content: str,
        by_hash: list[dict[bytes, int]],
        sequences: Sequence[Stored],
        windows: Sequence[int | None],
        size: int,
    ) -> None:
        self.content, self.by_hash = content, by_hash
        self.sequences = {stored.id: stored for stored in sequences}
        self._windows, self._size = windows, size
        self._starts: dict[tuple[int, ...], list[Stored]] = {}
        for stored in sequences:
            if stored.cached:
                self._starts.setdefault(tuple(stored.token_ids[: min(size, stored.cached)]), []).append(stored)
        self._start_lengths = sorted({len(start) for start in self._starts})

    def salt(self, own: str | None) -> str:
        """What keeps a snapshot's blocks to those that continue it, or a fork of it, and tenants apart as they were.

        Args:
            own: the salt that a request came with.
        """
        return f"kvist:{self.content}" if own is None else f"kvist:{self.content}:{own}"

    def chain(self, hashes: Sequence[bytes], limit: int) -> int:
        """As `chain_tokens`, from the snapshot's pages."""
        return chain_tokens(hashes, limit, self._size, self._windows, lambda group, name: name in self.by_hash[group])

    def longest(self, token_ids: Sequence[int], salt: str | None = None) -> Stored | None:
        """The sequence with the most cached tokens of those that ``token_ids``, being longer, starts with.

        Only one of the same salt (a digest of it) counts: what one tenant computed is not told to another.
        """
        best: Stored | None = None
        for length in self._start_lengths:
            for stored in self._starts.get(tuple(token_ids[:length]), ()):
                is_longer = best is None or stored.cached > best.cached
                if is_longer and stored.state.get("salt") == salt and starts_with(token_ids, stored):
                    best = stored
        return best


def starts_with(token_ids: Sequence[int], stored: Stored) -> bool:
    """Whether all cached tokens of a sequence begin ``token_ids``, and one more follows."""
    cached = stored.cached
    return len(token_ids) > cached and list(token_ids[:cached]) == stored.token_ids[:cached]
