"""The whole prefix cache: snapshot, SIGKILL, a fresh server, checkout, and every conversation goes on as before.

40 conversations over 20 prefixes. What the old server gives for each next turn is asked of it after the snapshot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kvist.testing.answers import Completion
from kvist.testing.scenario.requests import (
    CHECKOUT,
    GREEDY,
    SEEDED,
    SNAPSHOT,
    SNAPSHOTS,
    Case,
    assert_same,
    at_once,
    kept,
    prompt,
)
from kvist.testing.scenario.store import manifests_of
from kvist.testing.vllm import VllmServer

ANSWER = 20
PREFIXES = [prompt(100 + 9 * n, seed=200 + n) for n in range(20)]
FIRST_TURNS = [[*PREFIXES[n // 2], *prompt(20 + 3 * n, seed=300 + n)] for n in range(40)]
QUESTIONS = [prompt(40 + n, seed=400 + n) for n in range(40)]
LIVE = Case("live", prompt(210, seed=500), SEEDED)
BLOCK = 32


@dataclass
class Old:
    """What the first server gave: the next turns' prompts and answers, and the snapshot before them.

    ``crowd`` is a snapshot that was taken while ``live`` ran.
    """

    turns: list[list[int]]
    answers: list[Completion]
    snapshot: dict[str, Any]
    live: list[Completion]
    crowd: dict[str, Any]


def converse(server: VllmServer, together: int) -> list[list[int]]:
    """The first turns, some at once; returns the prompts of the next ones."""

    def turn(at: int) -> list[int]:
        answer = server.complete(FIRST_TURNS[at], max_tokens=ANSWER, **GREEDY)
        return [*FIRST_TURNS[at], *answer.token_ids, *QUESTIONS[at]]

    turns: list[list[int]] = []
    for first in range(0, 40, together):
        turns += at_once([lambda at=at: turn(at) for at in range(first, first + together)])  # type: ignore[misc]
    return turns


def next_turns(server: VllmServer, turns: list[list[int]]) -> list[Completion]:
    return [server.complete(turn, max_tokens=8, **GREEDY) for turn in turns]


class TestLargePool:
    @pytest.fixture(scope="class")
    @classmethod
    def old(cls, store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> Old:
        server = start(model(), store)
        turns = converse(server, together=1)
        running = server.stream(LIVE.prompt, name=LIVE.name, max_tokens=400, **LIVE.params)
        running.wait(50)
        snapshot = server.post(SNAPSHOT, {"name": "all"})
        live = running.result()
        # Alone again. The pool holds all of it and each asks for tokens of its own: no answer changes the next one's.
        old = Old(turns, next_turns(server, turns), snapshot, [live], snapshot)
        server.kill()
        return old

    @pytest.fixture(scope="class")
    @classmethod
    def fresh(
        cls, old: Old, store: str, model: Callable[..., Path], start: Callable[..., VllmServer]
    ) -> Iterator[VllmServer]:
        server = start(model(), store)
        yield server
        server.kill()

    def test_hits_are_those_of_the_old_server(self, old: Old, fresh: VllmServer) -> None:
        answer = fresh.post(CHECKOUT, {"cid": "all"})
        assert answer["ok"] is True
        assert answer["cid"] == old.snapshot["cid"]
        assert kept(answer) == kept(old.snapshot)
        got = next_turns(fresh, old.turns)
        assert [one.cached_tokens for one in got] == [one.cached_tokens for one in old.answers]
        # The old server must have hit each conversation's whole blocks, or the test is about nothing.
        assert all(
            one.cached_tokens >= (len(first) + ANSWER - 1) // BLOCK * BLOCK
            for one, first in zip(got, FIRST_TURNS, strict=True)
        )
        for one, before in zip(got, old.answers, strict=True):
            assert_same(one.steps, before.steps)

    def test_the_live_request_is_in_it(self, old: Old, fresh: VllmServer) -> None:
        ((name, (tokens, cached)),) = kept(old.snapshot).items()
        assert "live" in name
        sampled = tokens - len(LIVE.prompt)
        got = fresh.resume(old.snapshot["cid"], name, max_tokens=100, **LIVE.params)
        assert got.cached_tokens == cached == tokens - 1
        assert_same(got.steps, old.live[0].steps[sampled : sampled + 100])

    def test_blocks_have_their_names(self, old: Old, fresh: VllmServer, store: str) -> None:
        (manifest,) = manifests_of(store, old.snapshot["cid"])
        named = {page.block for page in manifest.pages if page.block is not None}
        assert all(len(name) == 64 for name in named)
        record = fresh.get(f"{SNAPSHOTS}/{old.snapshot['cid']}")
        assert record["name"] == "all"
        assert record["pages"] == len(manifest.pages) >= len(named)


HASHES = """
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils as u
u.init_none_hash(sha256)
found = []
for tokens in arguments[0]:
    parent, names = None, []
    for at in range(0, len(tokens) - arguments[1] + 1, arguments[1]):
        parent = u.hash_block_tokens(sha256, parent, tokens[at:at + arguments[1]], None)
        names.append(bytes(parent).hex())
    found.append(names)
emit(found)
"""


@pytest.mark.slow
class TestSmallPool:
    """40 blocks of 32: less than what the conversations fill, and what four long requests grow to."""

    OPTIONS = ("--num-gpu-blocks-override", "40", "--max-model-len", "1024")
    RUNNING = tuple(Case(f"running-{n}", prompt(40 + n, seed=600 + n), SEEDED | {"seed": n}) for n in range(4))
    LONG = 400

    @pytest.fixture(scope="class")
    @classmethod
    def old(cls, store: str, model: Callable[..., Path], start: Callable[..., VllmServer]) -> Old:
        server = start(model(), f"{store}-small", *cls.OPTIONS, deterministic=True)
        alone = [server.complete(case.prompt, max_tokens=cls.LONG, **case.params) for case in cls.RUNNING]
        streams = [
            server.stream(case.prompt, name=case.name, max_tokens=cls.LONG, **case.params) for case in cls.RUNNING
        ]
        for stream in streams:
            stream.wait(30)
        crowd = server.post(SNAPSHOT, {"name": "crowd"})
        live = [stream.result() for stream in streams]
        turns = converse(server, together=4)[::-1]  # the latest first: it is the one that is still cached
        snapshot = server.post(SNAPSHOT, {"name": "all"})
        metrics = server.http.get("/metrics").text
        old = Old(turns, next_turns(server, turns), snapshot, live, crowd)
        server.kill()
        for one, other in zip(live, alone, strict=True):
            assert_same(one.steps, other.steps)
        preempted = [line for line in metrics.splitlines() if line.startswith("vllm:num_preemptions_total")]
        assert sum(float(line.rpartition(" ")[2]) for line in preempted) > 0, "the pool was too large to preempt"
        return old

    @pytest.fixture(scope="class")
    @classmethod
    def fresh(
        cls, old: Old, store: str, model: Callable[..., Path], start: Callable[..., VllmServer]
    ) -> Iterator[VllmServer]:
        server = start(model(), f"{store}-small", *cls.OPTIONS, deterministic=True)
        yield server
        server.kill()

    def test_hits_are_what_the_snapshot_holds(
        self, old: Old, fresh: VllmServer, store: str, run_offline: Callable[..., Any]
    ) -> None:
        """An oracle from vLLM's own hashes: the leading blocks of a prompt that were cached at the snapshot.

        The old server, asked for 40 turns in its small pool, evicts what it held with every answer; a checked-out
        snapshot stays. So each turn hits at least what the old server *would* have given, and more only where an
        earlier turn on this server computed the prefix that both share.
        """
        (manifest,) = manifests_of(f"{store}-small", old.snapshot["cid"])
        held = {page.block for page in manifest.pages}
        assert len(held) <= 40
        names = run_offline(HASHES, old.turns, BLOCK)
        oracle = [
            next((at for at, name in enumerate(blocks) if name not in held), len(blocks)) * BLOCK for blocks in names
        ]
        assert 0 < sum(hits > 0 for hits in oracle) < 40, "some were evicted, some not"
        # Before it did anything else, the old server gave just that.
        assert old.answers[0].cached_tokens == oracle[0]
        assert fresh.post(CHECKOUT, {"cid": "all"})["ok"] is True
        got = next_turns(fresh, old.turns)
        for at, one in enumerate(got):
            shared = len(PREFIXES[(39 - at) // 2]) // BLOCK * BLOCK if at % 2 else 0
            assert oracle[at] <= one.cached_tokens <= max(oracle[at], shared), f"turn {at}"
            assert_same(one.steps, old.answers[at].steps)

    def test_requests_that_no_longer_fit_together_go_on(self, old: Old, fresh: VllmServer) -> None:
        """Four at once into a pool that preempts them: each comes out as if alone."""
        found = kept(old.crowd)
        assert len(found) == 4
        assert fresh.get("/v1/models")["data"]

        def run(case: Case) -> tuple[int, Completion]:
            (name,) = (name for name in found if f"{case.name}-" in name)
            sampled = found[name][0] - len(case.prompt)
            return sampled, fresh.resume(old.crowd["cid"], name, max_tokens=self.LONG - sampled, **case.params)

        results = at_once([lambda case=case: run(case) for case in self.RUNNING])  # type: ignore[misc]
        for (sampled, got), whole in zip(results, old.live, strict=True):
            assert_same(got.steps, whole.steps[sampled:])
        assert fresh.http.get("/health").status_code == 200
