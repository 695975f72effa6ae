"""What is simulated: one engine, and the cluster that it is part of. Every field is checked when it is set."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Final, Literal, get_args

from kvist.blocks.policy import POLICIES
from kvist.errors import InvalidInput
from kvist.router.score import ScoreConfig
from kvist.sim.timing import SPEEDUPS, Polynomial, Timing
from kvist.sim.trace.columns import MAX_MS, MAX_TOKENS
from kvist.tiers.config import TiersConfig

Preemption = Literal["lifo", "fifo"]
Scheduling = Literal["vllm", "trtllm", "sglang"]
SglangPolicy = Literal["fifo", "lpm"]
Routing = Literal["round_robin", "kv"]

ENGINE_POLICY = "vllm"  # the engine's own pool: blank slots first, then the least recently used

MAX_BLOCKS: Final = 2**24
"""Slots of a pool."""

MAX_BLOCK_SIZE: Final = 2**20
"""Tokens of a block."""

MAX_BYTES_PER_TOKEN: Final = 2**30
"""Of the cache of all layers: no model comes near."""

MAX_RANKS: Final = 4096
"""Engines of a cluster, each counted with all its ranks."""

GBPS: Final = (1e-6, 1e9)
"""Bandwidths, from a modem's to what takes no time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostOffload:
    """Host memory beside each engine, written through, as the native offloading of Dynamo's mocker.

    Attributes:
        num_blocks: slots in host memory.
        store_gbps: device to host, in 1e9 bytes a second.
        load_gbps: host to device.
        latency_ms: before the first byte.
    """

    num_blocks: int
    store_gbps: float = 32.0
    load_gbps: float = 32.0
    latency_ms: float = 0.0

    def __post_init__(self) -> None:
        require_whole(self, "num_blocks", most=MAX_BLOCKS)
        require_between(self, "store_gbps", "load_gbps", limits=GBPS)
        require_at_least_0(self, "latency_ms", most=MAX_MS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SglangOptions:
    """What only SGLang's scheduling knows. The defaults are those of Dynamo's mocker.

    Attributes:
        schedule_policy: who is admitted first: who came first, or who finds most of its prompt in the cache.
        max_prefill_tokens: tokens of the prompts of one pass.
        chunked_prefill_size: tokens of them, too; a prompt that has more is computed in parts.
        clip_max_new_tokens: no sequence is expected to get more tokens than this.
        schedule_conservativeness: more than 1 keeps more of the pool free for the answers of what runs.
    """

    schedule_policy: SglangPolicy = "fifo"
    max_prefill_tokens: int = 16384
    chunked_prefill_size: int = 8192
    clip_max_new_tokens: int = 4096
    schedule_conservativeness: float = 1.0

    def __post_init__(self) -> None:
        require_one_of(self, "schedule_policy", get_args(SglangPolicy))
        require_whole(self, "max_prefill_tokens", "chunked_prefill_size", "clip_max_new_tokens")
        require_positive(self, "schedule_conservativeness", most=1e6)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """One engine. The defaults are those of Dynamo's mocker.

    Attributes:
        num_blocks: slots of the device's pool.
        block_size: tokens a block.
        max_num_seqs: sequences that run at once.
        max_num_batched_tokens: tokens of one pass.
        max_model_len: tokens of prompt and answer together; None: no limit.
        reject_oversized: whether a request that the pool can not hold is turned away when its turn comes, or when it
            has outgrown the pool; otherwise such a trace is refused.
        prefix_caching: whether blocks are found again by their content.
        chunked_prefill: whether a prompt may be split over passes.
        scheduling: vLLM's; TensorRT-LLM's, which admits what it can finish and never preempts; SGLang's.
        sglang: what only SGLang's scheduling knows.
        preemption: who gives way when slots run out: the last admitted (lifo) or the first.
        policy: of eviction: "vllm", the engine's own, or one of `kvist.blocks.policy.POLICIES`.
        timing: how long passes take.
        speedup: all passes are so much faster.
        decode_speedup: decode passes are faster by this, too.
        startup_ms: from the start to the first pass.
        kv_bytes_per_token: of all layers; needed where bytes are moved.
        tiers: host memory and disks below the pool, as `kvist.tiers` moves blocks; each engine has its own.
        host_offload: host memory in the manner of Dynamo's mocker.
    """

    num_blocks: int = 16384
    block_size: int = 64
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int | None = None
    reject_oversized: bool = False
    prefix_caching: bool = True
    chunked_prefill: bool = True
    scheduling: Scheduling = "vllm"
    sglang: SglangOptions = field(default_factory=SglangOptions)
    preemption: Preemption = "lifo"
    policy: str = ENGINE_POLICY
    timing: Timing = field(default_factory=Polynomial)
    speedup: float = 1.0
    decode_speedup: float = 1.0
    startup_ms: float = 0.0
    kv_bytes_per_token: int = 0
    tiers: TiersConfig | None = None
    host_offload: HostOffload | None = None

    def __post_init__(self) -> None:
        require_whole(self, "num_blocks", most=MAX_BLOCKS)
        require_whole(self, "block_size", most=MAX_BLOCK_SIZE)
        require_whole(self, "max_num_seqs", "max_num_batched_tokens")
        if self.max_model_len is not None:
            require_whole(self, "max_model_len")
        require_between(self, "speedup", "decode_speedup", limits=SPEEDUPS)
        require_at_least_0(self, "startup_ms", most=MAX_MS)
        require_whole(self, "kv_bytes_per_token", least=0, most=MAX_BYTES_PER_TOKEN)
        require_one_of(self, "scheduling", get_args(Scheduling))
        require_one_of(self, "preemption", get_args(Preemption))
        require_one_of(self, "policy", (ENGINE_POLICY, *POLICIES))
        require_type(self, "sglang", SglangOptions)
        require_type(self, "timing", Timing)
        require_type(self, "tiers", TiersConfig | None)
        require_type(self, "host_offload", HostOffload | None)
        self._require_simulated()
        if self.scheduling != "sglang" and self.max_num_batched_tokens < self.max_num_seqs:
            raise InvalidInput(
                f"max_num_batched_tokens must be at least max_num_seqs ({self.max_num_seqs}), a token for each running "
                f"sequence; got {self.max_num_batched_tokens}"
            )
        below = [name for name in ("tiers", "host_offload") if getattr(self, name) is not None]
        if len(below) == 2:
            raise InvalidInput("tiers and host_offload are two ways to have host memory: give one of them")
        if below and not self.kv_bytes_per_token:
            raise InvalidInput(f"{below[0]} moves blocks: kv_bytes_per_token must say how large they are; got 0")
        if below and not self.prefix_caching:
            raise InvalidInput(f"{below[0]} keeps blocks to find them again: it needs prefix_caching")

        block_bytes = self.block_size * self.kv_bytes_per_token
        if self.tiers is not None and self.tiers.block_bytes != block_bytes:
            raise InvalidInput(
                f"tiers.block_bytes must be block_size x kv_bytes_per_token, {block_bytes}; "
                f"got {self.tiers.block_bytes}"
            )

    def _require_simulated(self) -> None:
        """Refuse fields that nothing would read, so that nobody takes them for measured."""
        reader, unread = "host_offload", ["policy", "scheduling"] if self.host_offload else []
        if self.scheduling == "sglang":
            reader = "the scheduling of sglang"
            unread = ["policy", "preemption", "tiers", "host_offload", "chunked_prefill", "max_num_batched_tokens"]
        for each in fields(self):
            if each.name in unread and (value := getattr(self, each.name)) != each.default:
                raise InvalidInput(
                    f"{each.name} is not simulated for {reader}: it must be {each.default!r}; got {value!r:.80}"
                )

    @property
    def eviction(self) -> str:
        """The policy of `kvist.blocks.policy` that stands for ``policy``: vLLM's own evicts the least recently used."""
        return "lru" if self.policy == ENGINE_POLICY else self.policy

    @property
    def capacity_tokens(self) -> int:
        """Tokens that the pool holds."""
        return self.num_blocks * self.block_size


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterConfig:
    """The engines together, and how requests come to them.

    Attributes:
        workers: engines; with ``prefill_workers``, those that decode.
        dp_size: data-parallel ranks of one engine, each with a pool of its own; a pass lasts as long as the slowest
            rank's.
        router: who serves a request: each in turn, or the cheapest by what its pool holds and has to do.
        score: weights of the second.
        event_lag_ms: after which the router knows what a pool stored or removed.
        prefill_workers: engines that only prefill and hand over; 0: every engine does both.
        transfer_gbps: between the two, in 1e9 bytes a second; each transfer has all of it.
        transfer_only_missing: whether blocks that the receiver has are not sent.
        concurrency: requests under way at once, regardless of their arrival; None: they come when the trace says.
        arrival_speedup: the trace's arrivals come so much faster.
        seed: of all that is drawn.
    """

    workers: int = 1
    dp_size: int = 1
    router: Routing = "round_robin"
    score: ScoreConfig = field(default_factory=ScoreConfig)
    event_lag_ms: float = 0.0
    prefill_workers: int = 0
    transfer_gbps: float = 64.0
    transfer_only_missing: bool = False
    concurrency: int | None = None
    arrival_speedup: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        require_whole(self, "workers", "dp_size", most=MAX_RANKS)
        require_whole(self, "prefill_workers", least=0, most=MAX_RANKS)
        ranks = (self.workers + self.prefill_workers) * self.dp_size
        if ranks > MAX_RANKS:
            raise InvalidInput(f"workers and prefill_workers must have at most {MAX_RANKS} ranks together; got {ranks}")
        if self.concurrency is not None:
            require_whole(self, "concurrency")
        require_whole(self, "seed", least=0, most=2**63 - 1)
        require_between(self, "transfer_gbps", limits=GBPS)
        require_between(self, "arrival_speedup", limits=SPEEDUPS)
        require_at_least_0(self, "event_lag_ms", most=MAX_MS)
        require_one_of(self, "router", get_args(Routing))
        require_type(self, "score", ScoreConfig)


def require_whole(config: object, *names: str, least: int = 1, most: int = MAX_TOKENS) -> None:
    """Refuse a count that is no `int`, or out of range."""
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or not least <= value <= most:
            raise InvalidInput(f"{name} must be a whole number, {least} to {most}; got {value!r:.80}")


def require_positive(config: object, *names: str, most: float = 2.0**53) -> None:
    """Refuse what is no number above 0, and what is beyond all sense."""
    for name in names:
        value = getattr(config, name)
        if not (_is_number(value) and 0 < value <= most):
            raise InvalidInput(f"{name} must be a number above 0{_bound(value, most)}; got {value!r:.80}")


def require_at_least_0(config: object, *names: str, most: float = 2.0**53) -> None:
    """Refuse what is no number, 0 or more, and what is beyond all sense."""
    for name in names:
        value = getattr(config, name)
        if not (_is_number(value) and 0 <= value <= most):
            raise InvalidInput(f"{name} must be a number, 0 or more{_bound(value, most)}; got {value!r:.80}")


def require_between(config: object, *names: str, limits: tuple[float, float]) -> None:
    """Refuse what is no number within limits, both included."""
    for name in names:
        value = getattr(config, name)
        if not (_is_number(value) and limits[0] <= value <= limits[1]):
            raise InvalidInput(f"{name} must be a number, {limits[0]:g} to {limits[1]:g}; got {value!r:.80}")


def require_type(config: object, name: str, type_: type | UnionType) -> None:
    """Refuse what is of another class."""
    value = getattr(config, name)
    if not isinstance(value, type_):
        wanted = getattr(type_, "__name__", str(type_))
        raise InvalidInput(f"{name} must be of the type {wanted}; got {value!r:.80}")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _bound(value: object, most: float) -> str:
    return f", and at most {most:g}" if _is_number(value) and value > most else ""  # type: ignore[operator]


def require_one_of(config: object, name: str, known: tuple[str, ...]) -> None:
    """Refuse a name that is not known."""
    value = getattr(config, name)
    if value not in known:
        raise InvalidInput(f"{name} must be one of {', '.join(known)}; got {value!r}")
