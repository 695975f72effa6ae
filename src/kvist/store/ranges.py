"""Which ranges of one object to ask for together. Knows offsets; knows no transport."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from kvist.store.base import Range

GAP: Final = 256 << 10
"""Bytes that are read and dropped rather than asked around: a far store sends them in less than a request's wait."""


@dataclass(frozen=True, slots=True)
class Run:
    """One request.

    Attributes:
        start: its first byte.
        end: past its last.
        ranges: the buffers that lie in it, or the parts of them that do.
    """

    start: int
    end: int
    ranges: list[Range]


def runs(ranges: Sequence[Range], window: int) -> list[Run]:
    """Join near ranges and split long ones into requests of at most ``window`` bytes. Empty ranges need none."""
    found: list[Run] = []
    start = end = 0
    near: list[Range] = []
    for each in ranges:
        if not each.out:
            continue
        for piece in (each,) if len(each.out) <= window else _pieces(each, window):
            past = piece.start + len(piece.out)
            if near and (piece.start - end > GAP or past - start > window):
                found.append(Run(start, end, near))
                near = []
            if not near:
                start = piece.start
            near.append(piece)
            end = past
    if near:
        found.append(Run(start, end, near))
    return found


def _pieces(long: Range, window: int) -> list[Range]:
    starts = range(0, len(long.out), window)
    return [Range(long.start + first, long.out[first : first + window]) for first in starts]
