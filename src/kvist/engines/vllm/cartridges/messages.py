"""What the scheduler's side of the cartridge connector tells the workers; they answer with `StepReport`."""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata

from kvist.engines.paged.plans import Load


@dataclass
class InjectPlan(KVConnectorMetadata):
    """What to bring in beside one step.

    Attributes:
        loads: the content of each is a cartridge's identity, and what it refers to are numbers of that one's pages.
        directories: where each cartridge of these is.
    """

    loads: list[Load] = field(default_factory=list)
    directories: dict[str, str] = field(default_factory=dict)
