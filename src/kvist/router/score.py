"""Who should serve a request: Dynamo's cost of each pool, and what is under way in each.

The cost counts blocks, and less is better. Prompt work is charged for what waits in a pool and for the request, less a
credit for each leading block that the pool has, by tier; then come the blocks that its requests hold until they end.
The rules are those of the default selector of Dynamo 1.6.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields

from kvist.errors import AlreadyExists, InvalidInput, NotFound
from kvist.router.index import Overlap, Pool

_NOTHING = Overlap(0, 0, 0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreConfig:
    """Weights of the cost; the defaults are Dynamo's. All are finite and 0 or more.

    Attributes:
        prefill_load_scale: of prompt work against held blocks.
        device_credit: for a block on the device (Dynamo: ``overlap_score_credit``).
        device_credit_decay: how fast that credit shrinks in a pool with more prompt work waiting than the idlest one.
        host_credit: for a block in host memory.
        disk_credit: for a block on disk or in external storage.
        shared_credit: for a block in a cache that all pools share (Dynamo: ``shared_cache_multiplier``).
        active_request_weight: blocks charged for each request under way.
        temperature: 0 takes the cheapest; more spreads, as a softmax over costs scaled to 0..1.
        decode_pool: pools that only decode: held blocks less the credit, no prompt work.
    """

    prefill_load_scale: float = 1.0
    device_credit: float = 1.0
    device_credit_decay: float = 0.0
    host_credit: float = 0.75
    disk_credit: float = 0.25
    shared_credit: float = 0.0
    active_request_weight: float = 0.0
    temperature: float = 0.0
    decode_pool: bool = False

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name != "decode_pool" and not (math.isfinite(value) and value >= 0):
                raise InvalidInput(f"{each.name} must be a finite number, 0 or more; got {value!r}")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A pool as it would be with the request in it.

    Attributes:
        overlap: leading blocks of the prompt that it has.
        waiting_tokens: prompt tokens of requests that have no first token yet, without this one.
        held_blocks: full blocks of all requests under way, and all of this one.
        requests: requests under way, without this one.
        shared_blocks: blocks after those on the device that a shared cache has.
    """

    overlap: Overlap = _NOTHING
    waiting_tokens: float = 0
    held_blocks: float = 0
    requests: int = 0
    shared_blocks: float = 0


def credit(config: ScoreConfig, overlap: Overlap, *, shared_blocks: float = 0, decay: float = 1.0) -> float:
    """Blocks of prompt work that a pool saves; what a slower tier has counts where no faster one does."""
    return (
        config.device_credit * decay * overlap.device
        + config.host_credit * (overlap.host - overlap.device)
        + config.disk_credit * (overlap.external - overlap.host)
        + config.shared_credit * shared_blocks
    )


def cost(
    config: ScoreConfig, candidate: Candidate, *, tokens: int, block_size: int, least_waiting_tokens: float = 0
) -> float:
    """The cost of a request of so many prompt tokens in one pool.

    Args:
        config: weights.
        candidate: the pool.
        tokens: of the prompt, 1 or more.
        block_size: tokens, 1 or more.
        least_waiting_tokens: of all candidates; from there on the device's credit decays.

    Raises:
        InvalidInput: no tokens, or a block size below 1.
    """
    _check_positive(tokens=tokens, block_size=block_size)
    held = candidate.held_blocks + 0.0
    requests = config.active_request_weight * candidate.requests
    if config.decode_pool:
        return max(0.0, held - credit(config, candidate.overlap, shared_blocks=candidate.shared_blocks)) + requests
    excess = max(0.0, candidate.waiting_tokens - least_waiting_tokens) / block_size
    decay = 1 / (1 + config.device_credit_decay * excess / blocks_of(tokens, block_size))
    saved = credit(config, candidate.overlap, shared_blocks=candidate.shared_blocks, decay=decay)
    prefill = max(0.0, (candidate.waiting_tokens + tokens) / block_size - saved)
    return config.prefill_load_scale * prefill + held + requests


def pick(costs: Sequence[float], temperature: float, sample: float) -> int:
    """Which of the costs to take, decided by a ``sample`` in [0, 1).

    Raises:
        InvalidInput: no costs.
    """
    if not costs:
        raise InvalidInput("no costs to pick from")
    least, most = min(costs), max(costs)
    if temperature == 0:
        ties = [i for i, each in enumerate(costs) if each == least]
        return ties[int(sample * len(ties))]
    if least == most:
        weights = [1.0] * len(costs)
    else:
        weights = [math.exp((least - each) / (most - least) / temperature) for each in costs]
    left = sample * sum(weights)
    picked = 0
    for i, weight in enumerate(weights):
        if weight:  # what has none is never picked
            picked = i
            left -= weight
            if left < 0:
                break
    return picked


def blocks_of(tokens: int, block_size: int) -> int:
    """Blocks that so many tokens take, the last perhaps in part."""
    return -(-tokens // block_size)


@dataclass(frozen=True, slots=True)
class Choice:
    """The pool that was chosen, and why.

    Attributes:
        pool: worker and rank.
        cost: in blocks.
        overlap: what it has of the prompt.
        costs: of all pools.
    """

    pool: Pool
    cost: float
    overlap: Overlap
    costs: Mapping[Pool, float]


@dataclass(slots=True)
class _Load:
    waiting_tokens: float = 0
    unnamed_blocks: int = 0
    blocks: Counter[int] = field(default_factory=Counter)
    requests: int = 0


@dataclass(slots=True)
class _Request:
    pool: Pool
    hashes: tuple[int, ...]
    unnamed_blocks: int
    waiting_tokens: float


class Selector:
    """Chooses pools, and keeps count of what is under way in each. Equal seeds and calls give equal choices.

    Args:
        block_size: tokens, 1 or more.
        config: weights.
        seed: decides ties and draws.
    """

    def __init__(self, block_size: int, config: ScoreConfig | None = None, *, seed: int = 0) -> None:
        _check_positive(block_size=block_size)
        self.block_size = block_size
        self.config = config or ScoreConfig()
        self._random = random.Random(seed)
        self._loads: dict[Pool, _Load] = {}
        self._requests: dict[str, _Request] = {}

    @property
    def pools(self) -> tuple[Pool, ...]:
        """All pools that can be chosen."""
        return tuple(self._loads)

    def add_pool(self, pool: Pool) -> None:
        """Make a pool known, in which nothing is under way.

        Raises:
            AlreadyExists: it is known.
        """
        if pool in self._loads:
            raise AlreadyExists(f"pool {pool} is known")
        self._loads[pool] = _Load()

    def remove_pool(self, pool: Pool) -> None:
        """Forget a pool and the requests in it.

        Raises:
            NotFound: it is unknown.
        """
        self._load_of(pool)
        del self._loads[pool]
        self._requests = {name: request for name, request in self._requests.items() if request.pool != pool}

    def candidate(
        self, pool: Pool, overlap: Overlap, *, tokens: int, hashes: Sequence[int] = (), shared_blocks: float = 0
    ) -> Candidate:
        """A pool as it would be with this request.

        Raises:
            NotFound: the pool is unknown.
        """
        load = self._load_of(pool)
        unnamed = max(0, blocks_of(tokens, self.block_size) - len(hashes))
        fresh = sum(name not in load.blocks for name in hashes)
        held = len(load.blocks) + load.unnamed_blocks + fresh + unnamed
        return Candidate(overlap, load.waiting_tokens, held, load.requests, shared_blocks)

    def select(
        self,
        overlaps: Mapping[Pool, Overlap],
        *,
        tokens: int,
        hashes: Sequence[int] = (),
        shared_blocks: Mapping[Pool, float] | None = None,
    ) -> Choice:
        """Choose a pool; nothing is counted until `start`.

        Args:
            overlaps: of `Index.find`; pools that it leaves out have nothing.
            tokens: of the prompt.
            hashes: sequence hashes of its full blocks: those that a pool already holds for others are not charged.
            shared_blocks: what a shared cache has after each pool's device blocks.

        Raises:
            NotFound: there are no pools.
            InvalidInput: no tokens.
        """
        if not self._loads:
            raise NotFound("no pool to choose from: none was added")
        shared = shared_blocks or {}
        least = min(load.waiting_tokens for load in self._loads.values())
        costs = {}
        for pool in self._loads:
            overlap = overlaps.get(pool, _NOTHING)
            candidate = self.candidate(pool, overlap, tokens=tokens, hashes=hashes, shared_blocks=shared.get(pool, 0))
            costs[pool] = cost(
                self.config, candidate, tokens=tokens, block_size=self.block_size, least_waiting_tokens=least
            )
        pool = list(costs)[pick(list(costs.values()), self.config.temperature, self._random.random())]
        return Choice(pool, costs[pool], overlaps.get(pool, _NOTHING), costs)

    def start(
        self, request_id: str, pool: Pool, *, tokens: int, overlap: Overlap = _NOTHING, hashes: Sequence[int] = ()
    ) -> None:
        """Count a request in a pool: its full blocks until `finish`, its prompt less the credit until `first_token`.

        Raises:
            NotFound: the pool is unknown.
            AlreadyExists: the request is under way.
            InvalidInput: no tokens.
        """
        load = self._load_of(pool)
        if request_id in self._requests:
            raise AlreadyExists(f"request {request_id!r} is under way in {self._requests[request_id].pool}")
        _check_positive(tokens=tokens)
        unnamed = max(0, tokens // self.block_size - len(hashes))
        waiting = max(0.0, tokens - credit(self.config, overlap) * self.block_size)
        self._requests[request_id] = _Request(pool, tuple(hashes), unnamed, waiting)
        load.waiting_tokens += waiting
        load.unnamed_blocks += unnamed
        load.blocks.update(hashes)
        load.requests += 1

    def first_token(self, request_id: str) -> None:
        """The prompt of a request is done; again changes nothing.

        Raises:
            NotFound: the request is not under way.
        """
        request = self._request_of(request_id)
        self._loads[request.pool].waiting_tokens -= request.waiting_tokens
        request.waiting_tokens = 0

    def finish(self, request_id: str) -> None:
        """A request has ended, whether it had a first token or not.

        Raises:
            NotFound: the request is not under way.
        """
        self.first_token(request_id)
        request = self._requests.pop(request_id)
        load = self._loads[request.pool]
        load.unnamed_blocks -= request.unnamed_blocks
        load.requests -= 1
        load.blocks.subtract(request.hashes)
        for name in request.hashes:
            if not load.blocks[name]:
                del load.blocks[name]
        if not load.requests:
            load.waiting_tokens = 0  # what rounding may have left

    def _load_of(self, pool: Pool) -> _Load:
        if pool not in self._loads:
            raise NotFound(f"pool {pool} is unknown; known are {list(self._loads)}")
        return self._loads[pool]

    def _request_of(self, request_id: str) -> _Request:
        if request_id not in self._requests:
            raise NotFound(f"request {request_id!r} is not under way")
        return self._requests[request_id]


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise InvalidInput(f"{name} must be 1 or more; got {value}")
