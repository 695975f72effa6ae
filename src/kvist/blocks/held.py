"""`Held`: which slots a chain of blocks got, remembered until the chain is given back. Spares looking up each block."""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import TypeVar

T = TypeVar("T")


class Held:
    """Chains that were taken in one move, each with its slots.

    A chain is valid while each of its blocks is referred to at least once for it: whoever gives references back
    otherwise than by `take` clears all.
    """

    def __init__(self) -> None:
        self._chains: dict[int, tuple[list[int], list[int]]] = {}

    def add(self, names: list[int], slots: list[int]) -> None:
        """These blocks, which differ, and lie in these slots, were referred to, the root first."""
        if names:
            self._chains[names[-1]] = (names, slots)

    def take(self, names: Sequence[int]) -> tuple[list[int], list[int]] | None:
        """The names and slots of a whole chain, which is given back the tail first; ``None`` if there is none."""
        if not names or (chain := self._chains.get(names[0])) is None or (there := chain[0][::-1]) != names:
            return None
        del self._chains[there[0]]
        return there, chain[1][::-1]

    def clear(self) -> None:
        """Forget all chains."""
        self._chains.clear()


def items_at(indices: Sequence[int], values: list[T]) -> tuple[T, ...]:
    """The values at these indices."""
    if len(indices) > 1:
        found: tuple[T, ...] = itemgetter(*indices)(values)
        return found
    return tuple(values[index] for index in indices)
