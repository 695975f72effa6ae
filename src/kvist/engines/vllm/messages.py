"""What the scheduler side tells the workers, and what they report back. Knows no vLLM class but the two it must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata


@dataclass(frozen=True, slots=True)
class Place:
    """One page in a worker's cache, as it was at one moment.

    Attributes:
        group: KV cache group.
        block: vLLM's block id.
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
        request_id: vLLM's id.
        content: of the snapshot, or identity of the cartridge, that the pages come from, or ``None``: the durable
            prefix cache.
        pages: where to put what: a page ``ix`` of the snapshot's manifests, or number of the cartridge's; or a block
            hash.
    """

    request_id: str
    content: str | None
    pages: list[tuple[Place, int | str]]


@dataclass(frozen=True, slots=True)
class Start:
    """A request that is scheduled for the first time, and has something to go on with.

    Attributes:
        request_id: vLLM's id.
        generator: state of the sampler's generator, or ``None``: as vLLM seeded it.
        prompt_tokens: how many of its tokens were a prompt when it was snapshotted, the others being output, where that
            matters (penalties, ``min_tokens``); else ``None``.
    """

    request_id: str
    generator: bytes | None
    prompt_tokens: int | None


@dataclass
class StepPlan(KVConnectorMetadata):
    """What the workers shall do in one step, beside computing it."""

    loads: list[Load] = field(default_factory=list)
    starts: list[Start] = field(default_factory=list)
    seeded: list[str] = field(default_factory=list)
    """Requests, scheduled for the first time, whose generator a later snapshot may want."""
    saves: list[Place] = field(default_factory=list)
    """Finished blocks for the durable prefix cache."""
    uses: list[tuple[int, str]] = field(default_factory=list)
    """Group and block hash of finished blocks that it has; a request's root first."""


@dataclass
class StepReport(KVConnectorWorkerMetadata):
    """What a worker has to say after a step.

    Attributes:
        loads: (bytes, seconds) of each load that came to its end.
        failed: requests whose pages could not be had.
        gone: block hashes that the durable prefix cache turned out not to hold (group, hash).
    """

    loads: list[tuple[int, float]] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    gone: list[tuple[int, str]] = field(default_factory=list)

    def aggregate(self, other: Any) -> StepReport:
        """One report of two ranks."""
        return StepReport(self.loads + other.loads, self.failed + other.failed, self.gone + other.gone)


@dataclass(frozen=True, slots=True)
class SequencePlan:
    """A sequence as the scheduler knows it, for a manifest of every group.

    Attributes:
        id: its name in the snapshot.
        request_id: vLLM's id.
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
