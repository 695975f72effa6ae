"""`ReplayScenario`: serve, snapshot live, SIGKILL, serve, checkout, go on. One request at a time."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from kvist.testing.answers import Completion, Step
from kvist.testing.live import LiveServer
from kvist.testing.scenario.base import NAMES, LiveScenario, Start
from kvist.testing.scenario.requests import (
    CHECKOUT,
    COMPLETIONS,
    FIRST,
    GREEDY,
    MORE,
    SEEDED,
    SNAPSHOT,
    SNAPSHOTS,
    Case,
    Past,
    assert_same,
    baseline,
    check_out,
    error_of,
    first_difference,
    go_on,
    interrupt,
    interrupt_twice,
    past_of,
    prompt,
)
from kvist.testing.scenario.store import flip_a_bit, manifests_of, without_pages


@dataclass
class History:
    """What the first server did before it was killed.

    Attributes:
        pasts: the requests that were interrupted.
        alone: the same, of another run that nobody interrupted.
        first, second: two snapshots of one running request.
        done: a request that had ended when it was snapshotted, and what would have come next.
    """

    pasts: dict[str, Past]
    alone: dict[str, Completion]
    first: Past
    second: Past
    done: tuple[Past, tuple[Step, ...]]


class ReplayScenario(LiveScenario):
    """What goes on from a snapshot in a fresh process is what would have come, in every bit."""

    @pytest.fixture(scope="class")
    @classmethod
    def past(cls, store: str, start: Start) -> History:
        """The first server's life, to its SIGKILL."""
        server = start(store)
        asked = cls.cases() | {"damaged": Case("damaged", prompt(300, 7), SEEDED)}
        alone = {name: baseline(server, case, cls.total, salted=cls.salts) for name, case in asked.items()}
        pasts = {name: interrupt(server, case, total=cls.total) for name, case in asked.items()}

        first, second = interrupt_twice(server, Case("twice", prompt(700), GREEDY), total=2 * cls.total)

        case = Case("done", prompt(90), SEEDED)
        whole = baseline(server, case, cls.total, salted=cls.salts)
        short = server.complete(case.prompt, name=case.name, max_tokens=FIRST, **case.params)
        done = past_of(case, short, server.post(SNAPSHOT, {"request_id": short.id}))
        assert_same(short.steps, whole.steps[:FIRST])
        assert done.sampled == FIRST

        server.kill()
        assert server.processes() == []
        return History(pasts, alone, first, second, (done, whole.steps[FIRST : FIRST + MORE]))

    @pytest.fixture(scope="class")
    @classmethod
    def prefilled(cls, past: History, fresh: LiveServer, start: Start, store: str) -> dict[str, Completion]:
        """The continuations that a server gives which has never heard of any snapshot."""
        server = fresh if cls.salts else start(f"{store}-beside")
        return {
            name: server.complete(
                past.pasts[name].token_ids,
                max_tokens=MORE,
                **past.pasts[name].case.params,
                **({"cache_salt": f"prefilled {name}"} if cls.salts else {}),
            )
            for name in NAMES
        }

    @pytest.fixture(scope="class")
    @classmethod
    def fresh(cls, past: History, store: str, start: Start) -> Iterator[LiveServer]:
        """The second server, on the first one's store."""
        server = start(store)
        yield server
        server.kill()

    @pytest.mark.parametrize("name", NAMES)
    def test_a_snapshot_does_not_disturb(self, name: str, past: History) -> None:
        """The stream brings what it would have brought."""
        alone = past.alone[name].steps
        assert_same(past.pasts[name].whole.steps[: len(alone)], alone)

    def test_a_second_snapshot_costs_what_is_new(self, past: History) -> None:
        """Of a running request: it continues the first, and copies the pages that the first has not."""
        assert past.second.answer["parents"] == [past.first.cid]
        assert past.second.sampled > past.first.sampled
        full = (past.first.tokens - 1) // self.page_size
        assert past.second.answer["pages_copied"] <= past.second.answer["pages"] - full

    @pytest.mark.parametrize("name", NAMES)
    def test_prefill_beside_it(self, name: str, past: History, prefilled: dict[str, Completion]) -> None:
        """What one has without snapshots. Where it differs is told, not judged."""
        got, before = prefilled[name], past.pasts[name]
        assert got.prompt_tokens == before.tokens
        assert got.cached_tokens < self.page_size, "no page; an engine may share the first tokens of one"
        at = first_difference(got.steps, before.next_steps())
        ids = first_difference([_id_of(step) for step in got.steps], [_id_of(step) for step in before.next_steps()])
        self.note(f"{name}: prefilled anew, log probabilities differ from step {at}, tokens from step {ids}")

    @pytest.mark.parametrize("name", NAMES)
    def test_goes_on_bit_for_bit(
        self, name: str, past: History, prefilled: dict[str, Completion], fresh: LiveServer
    ) -> None:
        """After a checkout, which says how many tokens the next request takes."""
        before = past.pasts[name]
        answer = check_out(fresh, before)
        got = go_on(fresh, before)
        assert_same(got.steps, before.next_steps())
        assert got.cached_tokens == answer["restored_tokens"] == before.tokens - 1
        assert got.prompt_tokens == before.tokens

    @pytest.mark.parametrize("name", ["greedy-page+1", "greedy-500"])
    def test_again_and_by_its_tokens(self, name: str, past: History, fresh: LiveServer) -> None:
        """A snapshot is not used up; and a request that names nothing, but has the tokens, goes on from it too."""
        before = past.pasts[name]
        check_out(fresh, before)
        for got in (go_on(fresh, before), fresh.complete(before.token_ids, max_tokens=MORE, **before.case.params)):
            assert_same(got.steps, before.next_steps())
            assert got.cached_tokens == before.tokens - 1

    def test_with_its_tokens_and_its_name(self, past: History, fresh: LiveServer) -> None:
        """The prompt may be given, and may go on: what is beyond the snapshot is computed."""
        before = past.pasts["greedy-500"]
        params = before.case.params
        got = fresh.complete(before.token_ids, kv_transfer_params=before.named, max_tokens=MORE, **params)
        assert_same(got.steps, before.next_steps())
        longer = [*before.token_ids, *prompt(40, seed=9)]
        got = fresh.complete(longer, kv_transfer_params=before.named, max_tokens=5, **params)
        assert got.prompt_tokens == len(longer)
        assert got.cached_tokens >= before.tokens - 1

    def test_with_sampling_parameters_left_out(self, past: History, fresh: LiveServer) -> None:
        """They go on as they were, the draws among them."""
        before = past.pasts["seeded-500"]
        assert_same(fresh.resume(before.cid, before.sequence, max_tokens=MORE).steps, before.next_steps())

    def test_a_request_that_had_ended(self, past: History, fresh: LiveServer) -> None:
        """Named, without a checkout before: naming a snapshot checks it out."""
        before, following = past.done
        got = go_on(fresh, before)
        assert_same(got.steps, following)
        assert got.cached_tokens == before.tokens - 1

    def test_two_snapshots_of_one_request(self, past: History, fresh: LiveServer) -> None:
        """The later is no use to the earlier, which goes on where it stood."""
        for before in (past.second, past.first):
            check_out(fresh, before)
            got = go_on(fresh, before)
            assert_same(got.steps, before.next_steps())
            assert got.cached_tokens == before.tokens - 1

    def test_the_list_and_the_record(self, past: History, fresh: LiveServer, store: str) -> None:
        """What was snapshotted is listed; a record tells the token ids."""
        cids = {record["cid"] for record in fresh.get(SNAPSHOTS)["snapshots"]}
        assert {before.cid for before in past.pasts.values()} <= cids
        before = past.pasts["greedy-page+1"]
        (sequence,) = fresh.get(f"{SNAPSHOTS}/{before.cid}")["sequences"]
        assert sequence["token_ids"] == before.token_ids
        (manifest,) = manifests_of(store, before.cid)
        assert manifest.layout.page_size_tokens == self.page_size
        assert manifest.sequences[0].state["prompt_tokens"] == len(before.case.prompt)

    # -- last, since they damage the store -------------------------------------------------------------------------

    def test_pages_that_are_gone(self, past: History, fresh: LiveServer, store: str) -> None:
        """Named, and nothing of it is ever attended to; once they are back, it goes on."""
        before = past.pasts["damaged"]
        with without_pages(store):
            error_of(fresh.http.post(CHECKOUT, json={"cid": before.cid}), 500, "missing_page")
            error_of(fresh.http.post(COMPLETIONS, json={"kv_transfer_params": before.named}), 500, "missing_page")

    def test_a_flipped_bit_and_its_healing(self, past: History, fresh: LiveServer, store: str) -> None:
        """Named by its digest, never data, no harm to others; the next snapshot of the same content heals it."""
        before, other = past.pasts["damaged"], past.pasts["greedy-page"]
        digest = flip_a_bit(store, before.cid, page=1)
        assert digest in error_of(fresh.http.post(CHECKOUT, json={"cid": before.cid}), 500, "damaged_page")
        error_of(fresh.http.post(COMPLETIONS, json={"kv_transfer_params": before.named}), 500, "damaged_page")
        check_out(fresh, other)
        assert_same(go_on(fresh, other).steps, other.next_steps())
        again = interrupt(fresh, before.case, total=self.total)
        at = min(len(again.whole.steps), len(before.whole.steps))
        assert_same(again.whole.steps[:at], before.whole.steps[:at])
        check_out(fresh, before)
        got = go_on(fresh, before)
        assert_same(got.steps, before.next_steps())
        assert got.cached_tokens == before.tokens - 1

    def test_other_weights_refuse_it(
        self, past: History, fresh: LiveServer, store: str, start: Start, tmp_path: Path
    ) -> None:
        """A model of the same name and shape: both revisions side by side. Ends the server of all tests above."""
        before = past.pasts["greedy-page"]
        here = fresh.get(f"{SNAPSHOTS}/{before.cid}")["layout"]
        fresh.kill()
        other = start(store, of=self.make_model(tmp_path / "model", seed=1))
        for path, body in ((CHECKOUT, {"cid": before.cid}), (COMPLETIONS, {"kv_transfer_params": before.named})):
            message = error_of(other.http.post(path, json=body), 409, "layout_mismatch")
            assert re.search(rf"does not fit the engine: revision '{here['revision']}' there, '[^']+' here", message)
        assert other.complete(before.case.prompt, max_tokens=1, **before.case.params).cached_tokens == 0
        other.kill()


def _id_of(step: Step) -> Step:
    return step._replace(logprob=0.0, top=())
