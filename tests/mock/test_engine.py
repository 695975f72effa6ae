"""The engine alone, on a loop: every request gets its tokens, and whoever follows the events knows the pool."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from kvist.blocks.events import Event
from kvist.engines.mock import MockEngine, Ticket
from kvist.errors import EngineError, InvalidInput
from kvist.hashing import local_block_hashes
from kvist.hashing.vllm import block_hashes, event_hash
from kvist.router.index import Index
from kvist.router.wire import from_event, to_event
from kvist.sim.config import EngineConfig
from kvist.sim.timing import Fixed

SIZE = 4
CONFIGS: list[dict[str, Any]] = [
    {"num_blocks": 400},
    {"num_blocks": 24},
    {"num_blocks": 16, "max_num_seqs": 8, "max_num_batched_tokens": 16},
    {"num_blocks": 24, "preemption": "fifo"},
    {"num_blocks": 24, "scheduling": "trtllm"},
    {"num_blocks": 24, "policy": "lineage"},
    {"num_blocks": 24, "policy": "sieve"},
    {"num_blocks": 24, "prefix_caching": False},
]


class Followed(MockEngine):
    """An engine with an index of its events beside it, and with a record of its tokens."""

    def __init__(self, **config: Any) -> None:
        self.index = Index()
        self.index.add_worker(0)
        self.batches: list[Sequence[Event]] = []
        super().__init__(EngineConfig(**{"block_size": SIZE, "speedup": 1e6, **config}), publish=self._publish_here)

    def _publish_here(self, events: Sequence[Event]) -> None:
        self.batches.append(events)
        for event in events:
            self.index.apply(0, to_event(from_event(event, block_size=SIZE), event.event_id))

    def ask(
        self, prompt: Sequence[int], answer: Sequence[int], deliver: Callable[[Ticket], None] = lambda _: None
    ) -> Ticket:
        return self.submit(self.answer(prompt, answer, "length"), deliver)

    def agrees(self, sequences: Sequence[Sequence[int]] = ()) -> None:
        """The index knows all blocks that were told; at rest, the pool has as much of these sequences as it knows."""
        assert self.index.hashes_of(0) == frozenset(self.here())
        for tokens in sequences:
            found = self.index.find(local_block_hashes(tokens, SIZE))
            assert (found[0, 0].device if found else 0) == self.num_held(tokens)

    def here(self) -> list[int]:
        table = self._contents
        return [name for name, is_here in zip(table._names, table._is_here, strict=True) if is_here]

    async def drain(self) -> None:
        while self._tickets:
            await asyncio.sleep(0)


def on_a_loop(engine: MockEngine, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async def main() -> None:
        running = asyncio.create_task(engine.run())
        try:
            await work()
        finally:
            engine.close()
            await running

    asyncio.run(main())


def chats(count: int, seed: int, *, longest: int = 56) -> list[tuple[list[int], list[int]]]:
    """Prompts that share beginnings, each with an answer; many continue an earlier one."""
    rng = random.Random(seed)
    made: list[tuple[list[int], list[int]]] = []
    for _ in range(count):
        start = rng.choice(made) if made and rng.random() < 0.6 else ([], [])
        whole = [*start[0], *start[1]][: longest // 2]
        if rng.random() < 0.3:
            whole = whole[: rng.randrange(len(whole) + 1)]
        prompt = [*whole, *(rng.randrange(3) for _ in range(rng.randint(1, longest // 3)))]
        made.append((prompt, [rng.randrange(3) for _ in range(rng.randint(1, longest // 4))]))
    return made


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_every_request_gets_its_tokens_and_the_events_tell_the_pool(config: dict[str, Any], seed: int) -> None:
    engine = Followed(**config)
    work = chats(120, seed)
    got: dict[int, list[int]] = {n: [] for n in range(len(work))}
    rng = random.Random(seed)

    async def run() -> None:
        tickets = []
        for number, (prompt, answer) in enumerate(work):
            tickets.append(engine.ask(prompt, answer, lambda ticket, n=number: got[n].append(ticket.generated)))
            if rng.random() < 0.5:
                await asyncio.sleep(0)
            if rng.random() < 0.1:
                engine.agrees()
        await engine.drain()
        assert all(ticket.is_done and ticket.error is None for ticket in tickets)
        assert [got[n] for n in got] == [list(range(1, len(answer) + 1)) for _, answer in work]
        engine.agrees([[*prompt, *answer] for prompt, answer in work])
        assert engine.usage == 0
        assert engine.num_running == engine.num_waiting == 0

    on_a_loop(engine, run)
    if config["num_blocks"] == 16:
        assert engine.preemptions > 0, "it was too easy"
    if config.get("prefix_caching", True):
        assert engine.batches
        if config["num_blocks"] < 100:
            assert len(engine._contents) < 500, "numbers are used again"
            assert engine._contents.num_known == len(engine.here())
    else:
        assert engine.batches == []
    assert len(engine._requests) <= len(work)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("seed", range(3))
def test_clients_that_leave(config: dict[str, Any], seed: int) -> None:
    engine = Followed(**config)
    rng = random.Random(seed)
    work = chats(150, seed + 10)

    async def run() -> None:
        tickets = []
        for prompt, answer in work:
            tickets.append(engine.ask(prompt, answer))
            if rng.random() < 0.5:
                rng.choice(tickets).cancel()
            if rng.random() < 0.5:
                await asyncio.sleep(0)
        await engine.drain()
        stayed = [ticket for ticket in tickets if not ticket.is_cancelled]
        assert 20 < len(stayed) < 148
        assert all(ticket.is_done for ticket in stayed)
        assert engine.usage == 0
        engine.agrees([[*prompt, *answer] for prompt, answer in work])
        last = engine.ask(*work[0])
        await engine.drain()
        assert last.is_done

    on_a_loop(engine, run)


def test_the_next_turn_hits_the_answer() -> None:
    engine = Followed(num_blocks=100)

    async def run() -> None:
        prompt, answer = list(range(10)), list(range(100, 109))
        engine.ask(prompt, answer)
        await engine.drain()
        again = engine.ask([*prompt, *answer, 7, 8], [1])
        await engine.drain()
        assert again.cached_tokens == 16, "18 of the 19 tokens were computed: four full blocks"

    on_a_loop(engine, run)


def test_the_names_of_blocks_are_vllms() -> None:
    engine = Followed(num_blocks=100)

    async def run() -> None:
        engine.ask(list(range(9)), [1])
        await engine.drain()

    on_a_loop(engine, run)
    ((event,),) = engine.batches
    assert event.data.hashes == [event_hash(name) for name in block_hashes(list(range(9)), SIZE)]  # type: ignore[union-attr]
    assert event.data.token_ids == [[0, 1, 2, 3], [4, 5, 6, 7]]  # type: ignore[union-attr]


def test_time_is_the_walls() -> None:
    engine = Followed(num_blocks=100, timing=Fixed(20.0, 5.0), speedup=1.0)

    async def run() -> None:
        ticket = engine.ask([1, 2, 3], list(range(30)))
        await engine.drain()
        assert (ticket.first - ticket.came) / 1e9 >= 0.02
        # passes that come late are made up for, as far as 50 ms
        assert (ticket.last - ticket.first) / 1e9 >= 0.09

    on_a_loop(engine, run)


def test_an_engine_that_starts_later() -> None:
    engine = Followed(num_blocks=100, startup_ms=80.0)

    async def run() -> None:
        begin = time.monotonic()
        tickets = [engine.ask([1, 2, n], [1, 2]) for n in range(3)]
        await asyncio.sleep(0.02)
        tickets[0].cancel()
        tickets.append(engine.ask([1, 2], [1]))
        assert (engine.num_running, engine.num_waiting) == (0, 4)
        await engine.drain()
        assert time.monotonic() - begin > 0.06
        assert [ticket.is_done for ticket in tickets] == [False, True, True, True]

    on_a_loop(engine, run)


def test_a_closed_engine() -> None:
    engine = Followed(num_blocks=100, timing=Fixed(1e6, 1e6), speedup=1.0)
    told: list[Ticket] = []

    async def run() -> None:
        ticket = engine.ask([1], [2, 3], told.append)
        await asyncio.sleep(0.01)
        engine.close()
        assert told == [ticket]
        assert isinstance(ticket.error, EngineError)
        with pytest.raises(EngineError, match="closed"):
            engine.ask([1], [2])
        engine.close()
        ticket.cancel()

    async def main() -> None:
        running = asyncio.create_task(engine.run())
        await run()
        running.cancel()

    asyncio.run(main())
    assert len(told) == 1


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"num_blocks": 4, "max_model_len": 17}, "max_model_len must be at most the pool's 16 tokens.*got 17"),
        ({"num_blocks": 4000, "chunked_prefill": False}, "max_num_batched_tokens must be at least max_model_len"),
        ({"num_blocks": 4, "scheduling": "sglang"}, "scheduling"),
    ],
)
def test_configurations_that_cannot_be(config: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidInput, match=says):
        MockEngine(EngineConfig(block_size=SIZE, **config))


@pytest.mark.parametrize(("prompt", "answer"), [([], [1]), ([1], []), ([1] * 15, [1, 2])])
def test_answers_that_cannot_be(prompt: list[int], answer: list[int]) -> None:
    with pytest.raises(InvalidInput):
        MockEngine(EngineConfig(block_size=SIZE, num_blocks=4)).answer(prompt, answer, "length")
