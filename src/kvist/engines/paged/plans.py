"""What the side that decides tells the side that moves pages, and what that reports back. Knows no engine's class."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Place:
    """One page in an engine's cache, as it was at one moment.

    Attributes:
        group: KV cache group.
        block: the engine's block id.
        generation: how often the block had been handed out; while it stays, so do the bytes of the filled tokens.
        fill: tokens of it that are computed.
        name: block hash in hex, or ``None``: partly filled, or nobody hashed it.
    """

    group: int
    block: int
    generation: int
    fill: int
    name: str | None = None


@dataclass(frozen=True, slots=True)
class Load:
    """Pages that a request waits for.

    Attributes:
        request_id: the engine's id.
        content: of the snapshot, or identity of the cartridge, that the pages come from, or ``None``: the durable
            prefix cache.
        pages: where to put what: a page ``ix`` of the snapshot's manifests, or number of the cartridge's; or a block
            hash.
    """

    request_id: str
    content: str | None
    pages: list[tuple[Place, int | str]]


@dataclass
class Report:
    """What one rank has to say after a step.

    Attributes:
        loads: (bytes, seconds) of each load that came to its end.
        failed: requests whose pages could not be had.
        gone: block hashes that the durable prefix cache turned out not to hold (group, hash).
    """

    loads: list[tuple[int, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    gone: list[tuple[int, str]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """A sequence as the deciding side knows it, for a manifest of every group.

    Attributes:
        id: its name in the snapshot.
        request_id: the engine's id.
        token_ids: all of them.
        cached: tokens whose KV is computed.
        blocks: by group: how many pages are out of the window, and the block ids of the others.
        state: what else it takes to go on.
    """

    id: str
    request_id: str
    token_ids: list[int]
    cached: int
    blocks: list[tuple[int, list[int]]]
    state: dict[str, Any]


@dataclass(frozen=True, slots=True)
class CapturePlan:
    """What one capture shall hold."""

    id: str
    places: list[Place]
    sequences: list[SequencePlan]
