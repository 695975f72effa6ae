"""Requests held back for their pages, beside SGLang's own prefix cache and pool. Runs where sglang is installed."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from hicache_real import HAS_SGLANG, load

torch = pytest.importorskip("torch")
if not HAS_SGLANG:
    pytest.skip("sglang is not installed in this environment (make test-sglang)", allow_module_level=True)
load("mem_cache.unified_radix_cache")

from test_pools import SLOTS, mha  # noqa: E402
from test_sglang_pager import scheduler  # noqa: E402

from kvist.engines.paged.arrivals import Arrivals  # noqa: E402
from kvist.engines.paged.checkouts import Checkouts  # noqa: E402
from kvist.engines.paged.matching import Stored  # noqa: E402
from kvist.engines.paged.plans import CapturePlan, Load  # noqa: E402
from kvist.engines.sglang import internals, requests  # noqa: E402
from kvist.engines.sglang.arriving import Arriving  # noqa: E402
from kvist.engines.sglang.generations import Generations  # noqa: E402
from kvist.engines.sglang.scheduler import SchedulerSide  # noqa: E402

SIZE = 16


class Mover:
    """Loads come when the test says so."""

    def __init__(self) -> None:
        self.arrivals = Arrivals()
        self.loads: list[Load] = []

    def load(self, loads: Sequence[Load]) -> None:
        self.loads += loads

    def bring(self, number: int = -1) -> None:
        self.arrivals.arrive(self.loads[number], 0, 0.0)


class Asked(SimpleNamespace):
    """A request of SGLang's, as far as it is looked at."""

    def finished(self) -> bool:
        return False

    def set_finish_with_abort(self, *why: Any) -> None:
        self.to_finish, self.origin_input_ids = why, [0]


def asked(rid: str, ids: Sequence[int], **more: Any) -> Asked:
    params = SimpleNamespace(
        custom_params=None,
        presence_penalty=0,
        frequency_penalty=0,
        repetition_penalty=1.0,
        min_new_tokens=0,
        max_new_tokens=8,
        ignore_eos=False,
    )
    absent = (
        *("multimodal_inputs", "input_embeds", "positional_embed_overrides", "token_type_ids", "session", "lora_id"),
        *("beam_group", "cache_salt", "extra_key", "to_finish", "finished_reason"),
    )
    found = dict.fromkeys(absent) | {"is_prefill_only": False, "output_ids": [], "output_ids_through_stop": []}
    found |= {"sampling_params": params, "kv": SimpleNamespace(holds_kv=False)}
    return Asked(rid=rid, origin_input_ids=list(ids), **(found | more))


class Engine:
    """SGLang's prefix cache and pool, and what is beside its scheduler; the test is the scheduler."""

    def __init__(self, *, is_failing: bool = True) -> None:
        self.scheduler = scheduler(mha(SIZE))
        self.scheduler.enable_overlap = False
        self.scheduler._engine_paused = False
        self.scheduler.new_token_ratio_tracker = SimpleNamespace(current=1.0)
        self.running: list[Any] = []
        self.scheduler.running_batch = SimpleNamespace(reqs=self.running, is_empty=lambda: not self.running)
        self.sharing = self.scheduler.token_to_kv_pool_allocator
        self.free = self.sharing.available_size()
        self.mover, self.checkouts = Mover(), Checkouts([None], SIZE)
        generations = Generations(self.sharing, SLOTS // SIZE + 1)
        self.arriving = Arriving(self.scheduler, self.checkouts, self.mover, generations, is_failing=is_failing)

    def check_out(self, name: str, ids: Sequence[int], cached: int) -> None:
        pages: list[int | None] = list(range(-(-cached // SIZE)))
        self.checkouts.add(name, name * 8, [{}], [Stored(name, list(ids), cached, [pages], {})])

    def ask(self, request: Asked) -> bool:
        """Whether it was held back; if not, it waits."""

        def go() -> None:
            self.scheduler.waiting_queue.append(request)

        held = self.arriving.hold(request, go)
        if not held:
            go()
        return held

    @property
    def waiting(self) -> list[str]:
        return [request.rid for request in self.scheduler.waiting_queue]

    def take_up(self, rid: str) -> None:
        """As SGLang does where it lets a request in: it has a row, and locks what it hit."""
        (request,) = (each for each in self.scheduler.waiting_queue if each.rid == rid)
        self.scheduler.waiting_queue.remove(request)
        key = internals.key(request.origin_input_ids[:-1], request.extra_key, request.cache_salt)
        found = self.scheduler.tree_cache.match_prefix(SimpleNamespace(key=key, req=request, cow_mamba=False))
        found = self.arriving.matched(request, len(key), found)
        request.prefix_len, request.last_node = found.device_prefix_len, found.last_device_node
        request.slots = self.arriving.indices(request)
        request.kv.holds_kv = True
        self.running.append(request)

    def room(self) -> int:
        return int(self.sharing.available_size() + self.scheduler.tree_cache.evictable_size())


def ids(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_it_hits_all_but_one() -> None:
    """Whole pages in the prefix cache, the rest in a page of its own; and nothing is kept once it is taken up."""
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    one = asked("one", ids(10, 41))
    assert engine.ask(one)
    engine.arriving.advance()
    assert engine.waiting == []
    engine.mover.bring()
    engine.arriving.advance()
    assert engine.waiting == ["one"]
    engine.take_up("one")
    assert one.prefix_len == 40
    assert len(one.slots) == 40
    engine.arriving.advance()
    assert not engine.arriving.is_busy
    assert engine.room() == engine.free - SIZE, "the page of its own is the request's now"


def test_the_same_id_again_has_pages_of_its_own() -> None:
    """What arrives for one that went away is not taken for what another of its id waits for."""
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    engine.check_out("b", ids(500, 41), 40)
    engine.ask(asked("one", ids(10, 41)))
    engine.arriving.advance()
    engine.arriving.let_go(lambda rid: True)
    engine.scheduler.waiting_queue.clear()
    engine.ask(asked("one", ids(500, 41)))
    engine.arriving.advance()
    engine.mover.bring(0)
    engine.arriving.advance()
    assert engine.waiting == [], "only the first load is there"
    engine.mover.bring(1)
    engine.arriving.advance()
    assert engine.waiting == ["one"]


def test_what_is_run_again_is_not_held_again() -> None:
    """SGLang queues a request anew when it paused or preempted it: its salt stays its own."""
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    one = asked("one", ids(10, 41))
    engine.ask(one)
    engine.arriving.advance()
    engine.mover.bring()
    engine.arriving.advance()
    engine.take_up("one")
    salt = one.cache_salt
    engine.running.clear()
    one.kv.holds_kv = False
    assert not engine.ask(one)
    assert one.cache_salt == salt
    assert requests.own_salt(one) is None


def test_other_weights_take_no_pages_of_these() -> None:
    """What is being loaded when weights are replaced is dropped; who waits for it is computed by the new ones."""
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    one = asked("one", ids(10, 41))
    engine.ask(one)
    engine.arriving.advance()
    beside = SimpleNamespace(_checkouts=engine.checkouts, _finished={}, arriving=engine.arriving)
    SchedulerSide.spoil(beside, "other weights")
    assert engine.waiting == ["one"]
    assert one.cache_salt is None
    engine.mover.bring()
    engine.arriving.advance()
    assert engine.room() == engine.free


def test_lost_pages_are_computed_under_its_own_salt() -> None:
    engine = Engine(is_failing=False)
    engine.check_out("a", ids(10, 41), 40)
    one = asked("one", ids(10, 41))
    engine.ask(one)
    engine.arriving.advance()
    engine.mover.arrivals.fail(engine.mover.loads[0])
    engine.arriving.advance()
    assert engine.waiting == ["one"]
    assert (one.cache_salt, one.to_finish, one.origin_input_ids) == (None, None, ids(10, 41))
    assert not engine.arriving.is_busy
    assert engine.room() == engine.free


def test_lost_pages_end_a_request() -> None:
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    one = asked("one", ids(10, 41))
    engine.ask(one)
    engine.arriving.advance()
    engine.mover.arrivals.fail(engine.mover.loads[0])
    engine.arriving.advance()
    assert engine.waiting == ["one"]
    assert "cannot be had" in one.to_finish[0]
    assert engine.room() == engine.free


def test_what_is_no_single_sequence_is_not_held() -> None:
    """Beams, whose tokens are elsewhere; and one that SGLang refuses already."""
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    refused = SimpleNamespace(err_type="BadRequestError")
    assert not engine.ask(asked("one", ids(10, 41), beam_group=object()))
    assert not engine.ask(asked("two", ids(10, 41), to_finish=refused))
    assert not internals.is_plain(asked("three", [0], finished_reason=refused))
    assert internals.is_plain(asked("four", [0], finished_reason=SimpleNamespace(err_type=None)))


def test_one_that_went_away_leaves_nothing() -> None:
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    engine.ask(asked("one", ids(10, 41)))
    engine.arriving.advance()
    engine.arriving.let_go(lambda rid: rid.startswith("on"))
    assert engine.waiting == ["one"], "for SGLang to abort it"
    engine.scheduler.waiting_queue.clear()
    assert engine.arriving.is_busy, "its pages are still being written"
    engine.mover.bring()
    engine.arriving.advance()
    assert not engine.arriving.is_busy
    assert engine.room() == engine.free


def test_those_that_wait_do_not_keep_each_other_out() -> None:
    """Two snapshots that do not fit in at once come in one after the other."""
    engine = Engine()
    for name, first in (("a", 10), ("b", 1000)):
        engine.check_out(name, ids(first, 113), 112)
        one = asked(name, ids(first, 113))
        one.sampling_params.max_new_tokens = 60
        engine.ask(one)
    engine.arriving.advance()
    assert len(engine.mover.loads) == 1
    engine.mover.bring()
    for _ in range(5):
        engine.arriving.advance()
    assert engine.waiting == ["a"]
    assert len(engine.mover.loads) == 1, "b would take what a needs to go on"
    engine.take_up("a")
    engine.arriving.advance()
    engine.running.clear()
    engine.arriving.advance()
    assert len(engine.mover.loads) == 2


def test_it_takes_no_room_from_those_that_run() -> None:
    """Or SGLang would end one of them for want of memory."""
    engine = Engine()
    engine.check_out("a", ids(10, 145), 144)
    other = asked("other", ids(1000, 33))
    other.kv.holds_kv = True
    other.sampling_params.max_new_tokens = 150
    engine.running.append(other)
    engine.ask(asked("a", ids(10, 145)))
    engine.arriving.advance()
    assert engine.mover.loads == []
    engine.running.clear()
    engine.arriving.advance()
    assert len(engine.mover.loads) == 1


def test_one_before_it_in_the_queue_gets_its_room() -> None:
    """SGLang looks no further than the first that finds none; nobody runs: what is behind it gives its pages back."""
    engine = Engine()
    engine.check_out("a", ids(10, 153), 152)
    engine.ask(asked("a", ids(10, 153)))
    engine.arriving.advance()
    engine.ask(asked("first", ids(2000, 200)))
    engine.mover.bring()
    engine.arriving.advance()
    assert engine.waiting == ["first", "a"]
    assert engine.room() < 200
    for _ in range(2):
        engine.arriving.advance()
    assert engine.waiting == ["first"]
    assert engine.room() == engine.free
    engine.take_up("first")
    assert internals.take(engine.scheduler, 13) is not None
    engine.arriving.advance()
    assert engine.waiting == []
    assert len(engine.mover.loads) == 1, "it waits for room like any other"


def test_alone_it_gives_back_its_partly_filled_page() -> None:
    """Where not even one request more fits in beside it: what is in that page is computed."""
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    one = asked("one", ids(10, 41))
    engine.ask(one)
    engine.arriving.advance()
    engine.mover.bring()
    engine.arriving.advance()
    assert engine.room() == engine.free - 3 * SIZE
    assert engine.arriving.contents == {"a" * 8}, "it may have to be loaded again"
    for _ in range(3):
        engine.arriving.advance()
    assert engine.room() == engine.free - 2 * SIZE
    assert engine.waiting == ["one"]
    engine.take_up("one")
    assert one.prefix_len == 32


class Slow:
    """Captures that wait to hear what the store has until they are hurried."""

    def __init__(self) -> None:
        self.is_hurried, self.asked = False, 0

    def begin(self, plan: CapturePlan) -> None:
        pass

    def hurry(self, capture: str) -> None:
        self.is_hurried = True

    def copy(self, capture: str, gone: Sequence[Sequence[int]]) -> dict[str, Any]:
        self.asked += 1
        assert self.asked < 100_000, "SGLang stands still"
        return {"left": 0 if self.is_hurried else 1, "busy": not self.is_hurried}


def test_sglang_does_not_stand_still_for_the_store() -> None:
    """A capture begins while another one is being written, however long that takes."""
    slow = Slow()
    beside = SimpleNamespace(_mover=SimpleNamespace(captures=slow))
    SchedulerSide.begin(beside, CapturePlan("second", [], []))
    assert slow.is_hurried


def test_while_sglang_is_paused_nobody_gives_way() -> None:
    engine = Engine()
    engine.check_out("a", ids(10, 41), 40)
    engine.ask(asked("one", ids(10, 41)))
    engine.arriving.advance()
    engine.mover.bring()
    engine.scheduler._engine_paused = True
    for _ in range(9):
        engine.arriving.advance()
    assert engine.room() == engine.free - 3 * SIZE
