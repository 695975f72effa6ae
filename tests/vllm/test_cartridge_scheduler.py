"""The scheduler's side alone, with requests and a pool of our own making: what it asks vLLM for, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

_BEGIN = """
import random
from types import SimpleNamespace
from kvist.cartridge.placing import Prefix
from kvist.engines.vllm.cartridges.placing import KEY, Standing, salt_of
from kvist.engines.vllm.cartridges.scheduler import CartridgeScheduler
from kvist.engines.vllm.messages import StepReport
from kvist.layout import Layout

SIZE = 16

def layouts(*kinds):
    return [Layout(page_size_tokens=SIZE, n_layers=2, n_heads=2, head_dim=8, dtype="f32", attention=kind, group=number,
                   n_groups=len(kinds)) for number, kind in enumerate(kinds)]

class Pool:
    num_gpu_blocks, hash_block_size, enable_caching = 1000, SIZE, True
    def get_new_blocks(self, count):
        return []

def side(*kinds, caching=True):
    made, pool = CartridgeScheduler(layouts(*(kinds or ("full",)))), Pool()
    pool.enable_caching = caching
    made.bind_pool(pool)
    return made

class Request(SimpleNamespace):
    def update_block_hashes(self):
        full = range(SIZE, self.num_tokens + 1, SIZE)
        self.block_hashes.extend(repr((self.cache_salt, end)).encode() for end in full)

def request(name, tokens, cartridge="aa", held=32, salt=None, **fields):
    params = None
    if cartridge:
        params = {KEY: Standing(Prefix(cartridge, cartridge, held, placed=True), "/dir/" + cartridge)}
        salt = salt_of(cartridge, salt)
    made = Request(**{"request_id": name, "kv_transfer_params": params, "cache_salt": salt, "num_tokens": tokens,
                      "skip_reading_prefix_cache": False, "block_hashes": [], **fields})
    made.update_block_hashes()
    return made

def ended(side, made):
    return side.finished(made, ([],))

def loads(plan):
    return [[load.request_id, load.content, [[p.group, p.block, p.fill, number] for p, number in load.pages]]
            for load in plan.loads]
"""


@pytest.fixture(scope="module")
def facts(run_offline: Callable[..., Any]) -> dict[str, Any]:
    return run_offline(_BEGIN + _FACTS)  # type: ignore[no-any-return]


_FACTS = """
out = {}
def matched(tokens, held, local=0, **fields):
    one = side()
    made = request("r", tokens, held=held, **fields)
    one.arrive(made)
    first = one.matched(made, local)
    assert one.matched(made, local) == first and one.plan(None).loads == []
    return first
out["matched"] = {
    "whole": matched(100, 32), "tail": matched(100, 45), "below a block": matched(100, 5),
    "less what is computed": matched(100, 45, 16), "all computed": matched(100, 32, 32), "beyond": matched(100, 32, 48),
    "prompt is the cartridge": matched(32, 32), "one more": matched(33, 32), "one token": matched(1, 1),
    "no cartridge": matched(100, 32, cartridge=None),
    "no marker": matched(100, 32, kv_transfer_params={"cartridge_id": "aa"}),
    "a client's marker": matched(100, 32, kv_transfer_params={KEY: {"id": "aa"}}),
}
import logging
said = []
class Listening(logging.Handler):
    def emit(self, record):
        said.append(record.levelname)
logging.getLogger("kvist.vllm").addHandler(Listening())
def heard(params):
    said.clear()
    side().arrive(request("r", 60, cartridge=None, kv_transfer_params=params))
    return list(said)
named = {"cartridge_id": "nobody"}
out["heard"] = [heard(params) for params in (None, {}, {**named, KEY: None}, named)]

probing = request("r", 100, skip_reading_prefix_cache=True)
side().arrive(probing)
out["reads the prefix cache"] = not probing.skip_reading_prefix_cache

one = side()
made = request("r", 60, held=45)
one.arrive(made)
one.allocated(made, ([7, 3, 9, 4],), 45)
one.allocated(made, ([7, 3, 9, 4],), 0)  # vLLM calls again once the load has ended
plan = one.plan(None)
out["loads"], out["directories"], out["next plan"] = loads(plan), plan.directories, loads(one.plan(None))
other = request("s", 60, held=45)
one.arrive(other)
out["waits"] = one.matched(other, 0)
salted = request("t", 60, held=45, salt="mine")
one.arrive(salted)
out["another salt does not"] = one.matched(salted, 0)
one.stepped(["r"], None)
out["goes on"] = one.matched(other, 32)
one.allocated(other, ([7, 3, 8, 5],), 13)
out["tail"] = loads(one.plan(None))
out["tail keeps nobody"] = one.matched(request("u", 60, held=45), 32)
out["told"] = [ended(one, each) for each in (made, other, salted)]
one.stepped(["s"], None)
out["left"] = [one.in_use, len(one._loading)]

uncached = side(caching=False)
first, second = request("r", 60), request("s", 60)
for each in (first, second):
    uncached.arrive(each)
uncached.allocated(first, ([1, 2],), 32)
out["without a prefix cache"] = uncached.matched(second, 0)

failing = side()
failing.arrive(made := request("r", 60, held=45))
failing.allocated(made, ([7, 3, 9, 4],), 45)
before = made.cache_salt, list(made.block_hashes)
failing.stepped(["r"], StepReport(failed=["r"]))
out["failed"] = [failing.matched(made, 0), made.cache_salt != before[0], not set(made.block_hashes) & set(before[1]),
                 failing.in_use, len(failing._loading)]

again = side()
again.arrive(made := request("r", 60, held=45))
again.allocated(made, ([7, 3, 9, 4],), 45)
again.plan(None), again.stepped(["r"], None)
made.num_tokens = 70  # preempted, with ten tokens sampled
out["preempted"] = [again.matched(made, 0), again.matched(made, 48)]
again.allocated(made, ([1, 2, 3, 4, 5],), 45)
out["again"], out["loaded"] = loads(again.plan(None)), ended(again, made)["cartridge"]["loaded_tokens"]

sliding = side("full", "sliding:20")
sliding.arrive(made := request("r", 100, held=70))
sliding.allocated(made, ([1, 2, 3, 4, 5], [0, 0, 0, 8, 9]), 70)
out["groups"] = loads(sliding.plan(None))[0][2]

two = side()
for name, cartridge in (("r", "aa"), ("s", "bb"), ("t", None)):
    two.arrive(made := request(name, 60, cartridge))
    if two.matched(made, 0)[0]:
        two.allocated(made, ([1 + 3 * ord(name), 2 + 3 * ord(name)],), 32)
plan = two.plan(None)
out["two"] = [[load[0], load[1], len(load[2])] for load in loads(plan)], plan.directories
emit(out)
"""


def test_how_many_tokens_are_asked_for(facts: dict[str, Any]) -> None:
    """All of the cartridge, its unaligned tail too, but for what is there and for one token to compute."""
    assert facts["matched"] == {
        "whole": [32, True],
        "tail": [45, True],
        "below a block": [5, True],
        "less what is computed": [29, True],
        "all computed": [0, False],
        "beyond": [0, False],
        "prompt is the cartridge": [31, True],
        "one more": [32, True],
        "one token": [0, False],
        "no cartridge": [0, False],
        "no marker": [0, False],
        "a client's marker": [0, False],
    }
    assert facts["reads the prefix cache"]


def test_an_error_is_logged_only_if_the_plugin_saw_nothing(facts: dict[str, Any]) -> None:
    """Not where the front end decided that an unknown id is computed without a cartridge."""
    assert facts["heard"] == [[], [], [], ["ERROR"]]


def test_what_is_loaded_where(facts: dict[str, Any]) -> None:
    assert facts["loads"] == [["r", "aa", [[0, 7, 16, 0], [0, 3, 16, 1], [0, 9, 13, 2]]]]
    assert facts["directories"] == {"aa": "/dir/aa"}
    assert facts["next plan"] == []
    assert facts["groups"] == [[0, 1, 16, 0], [0, 2, 16, 1], [0, 3, 16, 2], [0, 4, 16, 3], [0, 5, 6, 4],
                               [1, 8, 16, 3], [1, 9, 6, 4]]  # fmt: skip
    assert facts["two"] == [[["r", "aa", 2], ["s", "bb", 2]], {"aa": "/dir/aa", "bb": "/dir/bb"}]


def test_a_shared_block_is_loaded_once(facts: dict[str, Any]) -> None:
    """Who needs a full block that is on its way waits for it; a tail is everyone's own."""
    assert facts["waits"] == [None, False]
    assert facts["another salt does not"] == [45, True]
    assert facts["goes on"] == [13, True]
    assert facts["tail"] == [["s", "aa", [[0, 8, 13, 2]]]]
    assert facts["tail keeps nobody"] == [0, False]  # a request that never arrived
    assert facts["without a prefix cache"] == [32, True]
    assert [told["cartridge"]["loaded_tokens"] for told in facts["told"]] == [45, 13, 0]
    assert facts["told"][0]["cartridge"].keys() == {"id", "identity", "tokens", "placed", "loaded_tokens"}
    assert facts["left"] == [0, 0]


def test_a_failed_load_is_not_tried_again_and_shares_nothing(facts: dict[str, Any]) -> None:
    assert facts["failed"] == [[0, False], True, True, 0, 0]


def test_a_preempted_request_is_loaded_again(facts: dict[str, Any]) -> None:
    assert facts["preempted"] == [[45, True], [0, False]]
    assert facts["again"][0][2] == [[0, 1, 16, 0], [0, 2, 16, 1], [0, 3, 13, 2]]
    assert facts["loaded"] == 90


_LIVES = """
draw = random.Random(arguments[0])
one, live, cached, loading, numbers = side(), {}, set(), {}, iter(range(10**6))
shared = 0

def hashes(made, first, last):
    return {(0, made.block_hashes[n]) for n in range(first, last)}

for turn in range(4000):
    act = draw.random()
    if act < 0.3 and len(live) < 12:
        held = draw.choice([5, 16, 20, 45, 64])
        name, kind = "r%d" % next(numbers), draw.choice(["aa", "bb", None])
        made = request(name, held + draw.randint(0 if kind is None else 1, 40), kind and kind + str(held), held,
                       draw.choice([None, "mine"]))
        live[name] = [made, "waiting"]
        one.arrive(made)
    elif act < 0.7:
        waiting = [made for made, state in live.values() if state == "waiting"]
        if not waiting:
            continue
        made = draw.choice(waiting)
        local = 0
        while (local + 1) * SIZE < made.num_tokens and made.block_hashes[local] in cached:
            local += 1
        state = repr((one._uses, one._loading, one._plan))
        tokens, beside = one.matched(made, local * SIZE)
        assert repr((one._uses, one._loading, one._plan)) == state, "matching has an effect"
        if tokens is None:
            shared += 1
            assert loading, "waits for nobody"
        elif tokens == 0:
            live[made.request_id][1] = "running"
            cached.update(made.block_hashes)
        elif draw.random() < 0.8:  # else there is no room
            one.allocated(made, (list(range(1, 20)),), tokens)
            full = (local * SIZE + tokens) // SIZE
            new = hashes(made, local, full)
            for others in loading.values():
                assert not new & others, "a block is loaded twice"
            loading[made.request_id] = new
            live[made.request_id][1] = "loading"
            (load,) = one.plan(None).loads
            assert [p.fill for p, _ in load.pages][:-1] == [SIZE] * (len(load.pages) - 1)
    elif act < 0.85 and loading:
        name = draw.choice(sorted(loading))
        new, failed = loading.pop(name), draw.random() < 0.2
        one.stepped([name], StepReport(failed=[name]) if failed else None)
        if name in live:
            made = live[name][0]
            live[name][1] = "waiting"
            if not failed:
                cached.update(block for _, block in new)
    elif live:
        name = draw.choice(sorted(live))
        made, state = live.pop(name)
        if state == "running" and draw.random() < 0.3:
            live[name] = [made, "waiting"]  # preempted
            if draw.random() < 0.5:
                cached.clear()
            continue
        ended(one, made)
for name in list(loading):
    one.stepped([name], None)
for made, _ in live.values():
    ended(one, made)
emit([one.in_use, len(one._loading), shared])
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_any_order_of_events(seed: int, run_offline: Callable[..., Any]) -> None:
    """Arrivals, loads that end or fail, clients that leave, preemptions: nothing is loaded twice, or stays."""
    in_use, loading, waits = run_offline(_BEGIN + _LIVES, seed)
    assert [in_use, loading] == [0, 0]
    assert waits > 10
