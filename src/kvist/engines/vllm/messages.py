"""What the scheduler side tells the workers, and what they report back. Knows no vLLM class but the two it must be."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata, KVConnectorWorkerMetadata

from kvist.engines.paged.plans import Load, Place, Report


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
class StepReport(Report, KVConnectorWorkerMetadata):
    """What a worker has to say after a step."""

    @classmethod
    def of(cls, report: Report | None) -> StepReport | None:
        """A rank's report as vLLM carries it; ``None``: there is none."""
        return None if report is None else cls(report.loads, report.failed, report.gone)

    def aggregate(self, other: Any) -> StepReport:
        """One report of two ranks."""
        return StepReport(self.loads + other.loads, self.failed + other.failed, self.gone + other.gone)
