"""`CompanyScenario`: snapshots of requests among others, continued among others; and twelve forks at once.

Where a prefill gives the same numbers as what it stands for, equal bits alone prove no restore: so each case also
proves by `cached_tokens` where they came from.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice

import pytest

from kvist.testing.answers import Completion
from kvist.testing.live import LiveServer
from kvist.testing.scenario.base import NAMES, LiveScenario, Start
from kvist.testing.scenario.requests import (
    CHECKOUT,
    FIRST,
    FORK,
    GREEDY,
    MORE,
    SEEDED,
    SNAPSHOT,
    SNAPSHOTS,
    STATS,
    Case,
    Past,
    assert_same,
    at_once,
    baseline,
    busy,
    check_out,
    go_on,
    interrupt,
    past_of,
    prompt,
)

FORKS = 12
TOGETHER = 4
"""So many are interrupted at once. So many are continued one by one, and then the rest of them at once."""


def batched(names: Iterable[str]) -> Iterator[list[str]]:
    """`TOGETHER` of them at a time."""
    rest = iter(names)
    while batch := list(islice(rest, TOGETHER)):
        yield batch


class CompanyScenario(LiveScenario):
    """As `ReplayScenario`, under four other running requests."""

    @pytest.fixture(scope="class")
    @classmethod
    def pasts(cls, store: str, start: Start) -> dict[str, Past]:
        """The requests that the first server was asked among others, some of them at once, before its SIGKILL."""
        server = start(store, company=True)
        asked = cls.cases(seed=50) | {"forked": Case("forked", prompt(450, seed=60), SEEDED)}
        alone = {name: baseline(server, asked[name], cls.total, salted=cls.salts) for name in NAMES[-2:]}
        with busy(server):
            pasts: dict[str, Past] = {}
            for names in batched(asked):
                calls = [partial(interrupt, server, asked[name], total=cls.total) for name in names]
                pasts |= dict(zip(names, at_once(calls), strict=True))
            pasts["whole"] = cls._all_of(server, Case("whole", prompt(200, seed=61), GREEDY))
        server.kill()
        assert server.processes() == []
        for name, whole in alone.items():
            assert_same(pasts[name].whole.steps[: cls.total], whole.steps)
        return pasts

    @classmethod
    def _all_of(cls, server: LiveServer, case: Case) -> Past:
        """Snapshot everything while a request and four others run; what became of that request."""
        stream = server.stream(case.prompt, name=case.name, max_tokens=2 * cls.total, **case.params)
        stream.wait(FIRST)
        answer = server.post(SNAPSHOT, {"name": "whole"})
        whole = stream.result()
        shown = server.get(f"{SNAPSHOTS}/{answer['cid']}")["sequences"]
        running = [seq for seq in shown if len(seq["token_ids"]) - seq["cached_tokens"] == 1]
        assert len(running) >= 5, "the request and the four others"
        (ours,) = [seq["id"] for seq in shown if seq["token_ids"][: len(case.prompt)] == case.prompt]
        (told,) = [seq for seq in answer["sequences"] if seq["id"] == ours]
        return past_of(case, whole, answer | {"sequences": [told]})

    @pytest.fixture(scope="class")
    @classmethod
    def fresh(cls, pasts: dict[str, Past], store: str, start: Start) -> Iterator[LiveServer]:
        """The second server, on the first one's store."""
        server = start(store, company=True)
        yield server
        server.kill()

    @pytest.fixture(scope="class")
    @classmethod
    def continued(cls, pasts: dict[str, Past], fresh: LiveServer) -> dict[str, Completion]:
        """All cases continued among four others."""
        chosen = [pasts[name] for name in NAMES]
        with busy(fresh):
            for before in chosen:
                check_out(fresh, before)
            one_by_one = [go_on(fresh, before) for before in chosen[:TOGETHER]]
            rest = [partial(go_on, fresh, before) for before in chosen[TOGETHER:]]
            return dict(zip(NAMES, one_by_one + at_once(rest), strict=True))

    @pytest.mark.parametrize("name", NAMES)
    def test_goes_on_bit_for_bit_among_others(
        self, name: str, pasts: dict[str, Past], continued: dict[str, Completion]
    ) -> None:
        """Whatever else is in the batch."""
        assert_same(continued[name].steps, pasts[name].next_steps())
        assert continued[name].cached_tokens == pasts[name].tokens - 1

    def test_twelve_forks(self, pasts: dict[str, Past], continued: dict[str, Completion], fresh: LiveServer) -> None:
        """The fork that samples as the original equals it; the others go their ways; shared pages are loaded once."""
        before = pasts["forked"]
        forks = fresh.post(FORK, {"cid": before.cid, "n": FORKS})["cids"]
        assert len(set(forks)) == FORKS
        counted = fresh.get(STATS)
        for cid in forks:
            answer = fresh.post(CHECKOUT, {"cid": cid})
            assert answer["restored_tokens"] == before.tokens - 1

        def run(at: int) -> Completion:
            params = before.case.params | {"seed": before.case.params["seed"] + at, "max_tokens": MORE}
            return fresh.resume(forks[at], before.sequence, **params)

        results = at_once([partial(run, at) for at in range(FORKS)])
        assert [got.cached_tokens for got in results] == [before.tokens - 1] * FORKS
        assert_same(results[0].steps, before.next_steps())
        assert len({tuple(got.token_ids) for got in results}) == FORKS
        # Full pages are shared. The last one, which each fork goes on to write, lies in a slot of each fork's own.
        full, fill = divmod(before.tokens - 1, self.page_size)
        after = fresh.get(STATS)
        for counter in ("pages_read", "pages_loaded"):
            assert 0 < after[counter] - counted[counter] <= full + FORKS * (fill > 0)

    def test_forks_that_go_the_same_way(self, pasts: dict[str, Past], fresh: LiveServer) -> None:
        """At once, from one state, with one seed: all of them are what would have come."""
        before = pasts["forked"]
        forks = fresh.post(FORK, {"cid": before.cid, "n": FORKS})["cids"]
        params = before.case.params | {"max_tokens": MORE}
        for got in at_once([partial(fresh.resume, cid, before.sequence, **params) for cid in forks]):
            assert_same(got.steps, before.next_steps())
            assert got.cached_tokens == before.tokens - 1

    def test_a_fork_of_a_fork(self, pasts: dict[str, Past], fresh: LiveServer) -> None:
        """A twig of the twig."""
        before = pasts["forked"]
        (fork,) = fresh.post(FORK, {"cid": before.cid})["cids"]
        (twig,) = fresh.post(FORK, {"cid": fork, "n": 1})["cids"]
        got = fresh.resume(twig, before.sequence, max_tokens=MORE, **before.case.params)
        assert_same(got.steps, before.next_steps())

    def test_a_snapshot_of_a_continued_request(self, pasts: dict[str, Past], fresh: LiveServer) -> None:
        """Snapshot, go on, snapshot again, go on again: still the first request."""
        before = pasts["greedy-page+1"]
        check_out(fresh, before)
        with busy(fresh):
            stream = fresh.stream(None, name="again", kv_transfer_params=before.named, max_tokens=MORE, **GREEDY)
            stream.wait(20)
            answer = fresh.post(SNAPSHOT, {"request_id": stream.id})
            assert_same(stream.result().steps, before.next_steps())
            assert answer["parents"] == [before.cid]
            again = past_of(before.case, before.whole, answer)
            got = go_on(fresh, again, 20)
            assert_same(got.steps, again.next_steps(20))
            assert got.cached_tokens == again.tokens - 1

    def test_the_whole_engine(self, pasts: dict[str, Past], fresh: LiveServer) -> None:
        """All that ran comes back; one of its sequences goes on among others."""
        before = pasts["whole"]
        answer = fresh.post(CHECKOUT, {"cid": "whole"})
        assert answer["cid"] == before.cid
        (ours,) = [seq for seq in answer["sequences"] if seq["id"] == before.sequence]
        assert (ours["tokens"], ours["cached_tokens"]) == (before.tokens, before.tokens - 1)
        with busy(fresh):
            got = go_on(fresh, before)
        assert_same(got.steps, before.next_steps())
        assert got.cached_tokens == before.tokens - 1
