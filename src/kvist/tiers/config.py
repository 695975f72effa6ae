"""What the tiers below a device are: sizes, bandwidths, and how blocks go down. Values only."""

from __future__ import annotations

import math
from typing import Literal, get_args

from msgspec import Struct

from kvist.blocks.policy import POLICIES
from kvist.errors import InvalidInput

Mode = Literal["watermark", "blocking"]
AdmissionRule = Literal["always", "second_touch", "frequency"]


def _require(config: Struct, field: str, holds: bool, expected: str) -> None:
    if not holds:
        raise InvalidInput(f"{type(config).__name__}.{field} must be {expected}, not {getattr(config, field)!r:.80}")


def _is_int(value: object) -> bool:
    return type(value) is int


def _is_number(value: object) -> bool:
    return type(value) in (int, float)


class TierConfig(Struct, frozen=True, kw_only=True):
    """One tier below the device, and the two links between it and the tier above.

    Attributes:
        capacity: blocks it holds.
        down_gb_per_s: of the link into it; ``math.inf`` if copying takes no time.
        up_gb_per_s: of the link out of it.
        latency_ms: of both links, see `kvist.tiers.links.Network.link`.
        policy: which block goes when it is full: a name of `kvist.blocks.policy.POLICIES`.

    Raises:
        InvalidInput: a value of another type, or out of range; the field is named.
    """

    capacity: int = 100_000
    down_gb_per_s: float = 14.0
    up_gb_per_s: float = 14.0
    latency_ms: float = 0.0
    policy: str = "lineage"

    def __post_init__(self) -> None:
        _require(self, "capacity", _is_int(self.capacity) and self.capacity >= 1, "an integer, 1 block or more")
        for field in ("down_gb_per_s", "up_gb_per_s"):
            _require(self, field, _is_number(getattr(self, field)) and getattr(self, field) > 0, "a number above 0")
        latency = self.latency_ms
        _require(self, "latency_ms", _is_number(latency) and 0 <= latency < math.inf, "a number, 0 or more, and finite")
        _require(
            self,
            "policy",
            isinstance(self.policy, str) and self.policy in POLICIES,
            f"one of {', '.join(sorted(POLICIES))}",
        )


class TiersConfig(Struct, frozen=True, kw_only=True):
    """The tiers of one worker, and how blocks go down.

    Attributes:
        block_bytes: of one block of all layers.
        host: the first tier below the device.
        disk: the one below that, or ``None`` for none.
        external: the lowest, or ``None`` for none.
        mode: ``"watermark"``: blocks are copied down as soon as nobody uses them, and an eviction waits for no copy
            unless the link has nothing else to do. ``"blocking"``: blocks are copied down when they are evicted, and
            their slots are free when that is done; this is what NVIDIA Dynamo's mocker does.
        admission: which blocks are worth copying down. ``"always"``: all. ``"second_touch"``: those whose use ended
            twice or more of late. ``"frequency"``: those whose use ended ``admission_count`` times or more of late,
            about: a sketch counts.
        admission_count: see ``admission``; 1 to 15.
        batch_blocks: a transfer into a lower tier carries as many blocks or fewer, and one out of it, too.
        transfers: how many go into one tier at a time for one worker; the others wait.
        queue_blocks: how many blocks may wait to be copied down from the device in the watermark mode; those that come
            later are not copied until they are used again.
        spill_blocks: how many blocks that a lower tier evicts may wait for, or be on, the link to the next; those
            beyond are lost.
        free_low: below this part of the device's slots that are free, blocks are evicted ahead of need (watermark
            mode), but none that waits to be copied.
        free_high: until this part, rounded up to whole blocks, is free.

    Raises:
        InvalidInput: a value of another type, or out of range; the field is named.
    """

    block_bytes: int
    host: TierConfig = TierConfig()
    disk: TierConfig | None = None
    external: TierConfig | None = None
    mode: Mode = "watermark"
    admission: AdmissionRule = "always"
    admission_count: int = 2
    batch_blocks: int = 32
    transfers: int = 1
    queue_blocks: int = 1024
    spill_blocks: int = 256
    free_low: float = 0.01
    free_high: float = 0.02

    def __post_init__(self) -> None:
        _require(
            self, "block_bytes", _is_int(self.block_bytes) and self.block_bytes >= 0, "an integer, 0 bytes or more"
        )
        _require(self, "host", isinstance(self.host, TierConfig), "a TierConfig")
        for field in ("disk", "external"):
            _require(self, field, isinstance(getattr(self, field), TierConfig | None), "a TierConfig, or None")
        _require(self, "external", self.external is None or self.disk is not None, "None where disk is None")
        _require(self, "mode", self.mode in get_args(Mode), f"one of {', '.join(get_args(Mode))}")
        _require(self, "admission", self.admission in get_args(AdmissionRule), f"one of {get_args(AdmissionRule)}")
        count = self.admission_count
        _require(self, "admission_count", _is_int(count) and 1 <= count <= 15, "an integer, 1 to 15")
        for field in ("batch_blocks", "transfers", "queue_blocks", "spill_blocks"):
            _require(self, field, _is_int(getattr(self, field)) and getattr(self, field) >= 1, "an integer, 1 or more")
        _require(self, "free_low", _is_number(self.free_low) and 0 <= self.free_low <= 1, "a number, 0 to 1")
        high = self.free_high
        _require(self, "free_high", _is_number(high) and self.free_low <= high <= 1, f"free_low ({self.free_low}) to 1")
