"""A cartridge's keys and values in vLLM's blocks: the same answers as with its document before the prompt."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from injecting import BEGIN, SAME, config, differ, document, prefilled

LENGTHS = (1, 5, 31, 32, 33, 64, 77, 500)
"""Below, at and beyond a block of 32."""
QUESTION = document(9, seed=99)
LEFT_NOTHING = [0, 0, 0]

_EQUAL = (
    BEGIN
    + """
model, config, documents, question = arguments
llm = make_llm(model, config=config, dtype="float32")
out = {}
for name, ids in documents.items():
    out[name] = {
        "plain": ask(llm, ids + question, salt="plain " + name),
        "placed": ask(llm, question, name, cartridge_prefix="virtual"),
        "repeated": ask(llm, ids + question[::-1], name),
        "repeated plain": ask(llm, ids + question[::-1], salt="plain " + name),
        "alone": ask(llm, ids, name) if len(ids) > 1 else None,
        "alone plain": ask(llm, ids, salt="plain " + name),
        "one token": ask(llm, question[:1], name),
        "one token plain": ask(llm, ids + question[:1], salt="plain " + name),
    }
out["left"] = left(llm)
out["stats"] = llm.collective_rpc("kvist", args=("cartridge_stats", {}))[0]["ranks"]
emit(out)
"""
)


@pytest.fixture(scope="module")
def made(model: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Path]]:
    """Cartridges of one model, by name and document."""
    root = tmp_path_factory.mktemp("cartridges")

    def make(shape: str, documents: dict[str, list[int]], *, has_ids: bool = True) -> dict[str, Path]:
        weights = model(shape, dtype="float32")
        made = {}
        for name, ids in documents.items():
            path = made[name] = root / f"{shape}-{name}-{has_ids}"
            if not path.exists():
                prefilled(weights, ids, path, name, has_ids=has_ids)
        return made

    return make


@pytest.mark.parametrize("shape", ["tiny", "windows"])
def test_answers_are_those_of_the_document(
    shape: str,
    model: Callable[..., Path],
    made: Callable[..., dict[str, Path]],
    run_offline: Callable[..., Any],
    note: Callable[[str], None],
) -> None:
    """Of any length; before a prompt, or as its beginning, or as all of it. No tail is cut."""
    documents = {f"d{length}": document(length) for length in LENGTHS}
    paths = made(shape, documents)
    got = run_offline(_EQUAL, str(model(shape, dtype="float32")), config(paths), documents, QUESTION)
    worst = 0.0
    for name, ids in documents.items():
        answers = got[name]
        pairs = [("placed", "plain"), ("repeated", "repeated plain"), ("one token", "one token plain")]
        pairs += [("alone", "alone plain")] if answers["alone"] is not None else []
        worst = max(worst, *(differ(answers[one], answers[other]) for one, other in pairs))
        assert worst < SAME
        assert answers["placed"]["loaded"] == len(ids)
        tail = len(ids) % 32
        assert [answers["repeated"]["loaded"], answers["one token"]["loaded"]] == [tail, tail]
        assert answers["repeated"]["cached"] == len(ids)
        if answers["alone"] is not None:
            assert answers["alone"]["loaded"] == (tail or 32) - 1  # the last token is computed
    assert got["left"] == LEFT_NOTHING
    (rank,) = got["stats"]
    assert rank["loads"] == rank["resident"] == len(LENGTHS)
    assert rank["in_use"] == rank["injections_failed"] == 0
    note(f"cartridges, {shape}: log probabilities within {worst:.1e} of the document's")


_TOGETHER = (
    BEGIN
    + """
model, config, documents, question = arguments
llm = make_llm(model, config=config, dtype="float32")
names = sorted(documents)
alone = {name: ask(llm, question, name, salt="alone") for name in names} | {"none": ask(llm, question, salt="alone")}
out = {"alone": alone}
side = connector(llm).scheduler
before = worker().stats()

# Two at once, of one cartridge: its full blocks are loaded once.
out["two"] = ask_all(llm, [(question + [7 + n], names[0], {}, None) for n in range(2)])
out["two pages"] = worker().stats()["pages_injected"] - before["pages_injected"]

# A, B, C and none with one and the same prompt, in turns and at once.
asked = [(question, name, {}, None) for _ in range(6) for name in [*names, None]]
out["mixed"] = ask_all(llm, asked)
out["in turns"] = [ask(llm, question, name) for _, name, _, _ in asked[:8]]

# What a client salts is its own.
out["salted"] = [ask(llm, question, names[0], salt=salt)["loaded"] for salt in ("one", "one", "two")]

# Whoever leaves while a load is under way, or waits for another one's, leaves nothing behind.
engine = llm.llm_engine
for turn in range(6):
    asked = {"prompt_token_ids": question, "cache_salt": "leaves %d" % turn}
    for n in range(3):
        engine.add_request("r%d-%d" % (turn, n), asked, sampling(names[turn % 3]))
    for _ in range(turn % 3):
        engine.step()
    engine.abort_request(["r%d-%d" % (turn, n) for n in ((0, 1, 2) if turn % 2 else (0, 1))])
    while engine.has_unfinished_requests():
        engine.step()
    while core(llm).scheduler.has_requests():
        core(llm).step_fn()
out["left"] = left(llm)
out["after"] = ask(llm, question, names[0])
out["evicted"] = llm.reset_prefix_cache()
out["reset"] = ask(llm, question, names[0])
emit(out)
"""
)


def test_requests_beside_each_other(
    model: Callable[..., Path], made: Callable[..., dict[str, Path]], run_offline: Callable[..., Any]
) -> None:
    documents = {"a": document(77, 1), "b": document(77, 2), "c": document(100, 3)}
    paths = made("tiny", documents)
    got = run_offline(_TOGETHER, str(model("tiny", dtype="float32")), config(paths), documents, QUESTION)
    alone = got["alone"]
    assert len({str(answer["ids"]) for answer in alone.values()}) == 4
    assert [answer["loaded"] for answer in got["two"]] == [77, 13]
    assert got["two pages"] == 3 + 1
    for name, answer in zip(["a", "b", "c", "none"] * 6, got["mixed"], strict=True):
        assert differ(answer, alone[name]) < SAME
    for name, answer in zip(["a", "b", "c", "none"] * 2, got["in turns"], strict=True):
        assert differ(answer, alone[name]) < SAME
    assert got["salted"] == [77, 13, 77]
    assert got["left"] == LEFT_NOTHING
    assert differ(got["after"], alone["a"]) < SAME
    assert got["after"]["loaded"] == 13
    assert got["evicted"]
    assert got["reset"]["loaded"] == 77
    assert differ(got["reset"], alone["a"]) < SAME


_PRESSED = (
    BEGIN
    + """
model, config, documents, question, blocks = arguments
names = sorted(documents)
asked = [(question + [n], [*names, None][n % 4], {"tokens": 150}, None) for n in range(12)]
llm = make_llm(model, config=config, dtype="float32", num_gpu_blocks_override=blocks, max_model_len=512)
seen = {}
preempt = core(llm).scheduler._preempt_request
def counting(request, *args, **kwargs):
    seen[request.request_id] = seen.get(request.request_id, 0) + 1
    return preempt(request, *args, **kwargs)
core(llm).scheduler._preempt_request = counting
out = {"answers": ask_all(llm, asked), "preemptions": sum(seen.values()), "left": left(llm)}
out["stats"] = worker().stats()
emit(out)
"""
)


def test_a_small_pool_preempts(
    model: Callable[..., Path], made: Callable[..., dict[str, Path]], run_offline: Callable[..., Any]
) -> None:
    """A preempted request gets its cartridge again, and its answer is what it is with room for all."""
    documents = {"a": document(77, 1), "b": document(77, 2), "c": document(100, 3)}
    paths = made("tiny", documents)
    weights = str(model("tiny", dtype="float32"))
    runs = [run_offline(_PRESSED, weights, config(paths), documents, QUESTION, blocks) for blocks in (400, 24)]
    assert runs[0]["preemptions"] == 0
    assert runs[1]["preemptions"] > 0
    for roomy, pressed in zip(runs[0]["answers"], runs[1]["answers"], strict=True):
        assert differ(roomy, pressed) < SAME
    again = [answer for answer in runs[1]["answers"] if (answer["loaded"] or 0) > 100]
    assert again, "nobody was loaded again"
    assert runs[1]["left"] == LEFT_NOTHING


_RESIDENT = (
    BEGIN
    + """
model, config, documents, question = arguments
llm = make_llm(model, config=config, dtype="float32")
names = sorted(documents)
out = {"answers": {}}
for turn in range(3):
    for name in names:
        llm.reset_prefix_cache()  # or the full blocks would be there
        out["answers"].setdefault(name, []).append(ask(llm, question, name))
out["stats"] = worker().stats()
llm.reset_prefix_cache()
out["at once"] = ask_all(llm, [(question + [n], name, {}, None) for n in range(3) for name in names])
out["alone"] = [ask(llm, question + [n], name, salt="alone") for n in range(3) for name in names]
out["at the end"] = worker().stats()
emit(out)
"""
)


def test_host_memory_for_one_of_three(
    model: Callable[..., Path], made: Callable[..., dict[str, Path]], run_offline: Callable[..., Any]
) -> None:
    """Cartridges that went out of memory come back; loads wait for each other's room, never beyond the bound."""
    documents = {"a": document(77, 1), "b": document(77, 2), "c": document(100, 3)}
    room = 4 * 2 * 4 * 4 * 32 * 32 * 4  # pages of c: 4 pages, K and V, layers, heads, tokens, head size, bytes
    paths = made("tiny", documents)
    extra = {"host_bytes": room, "preload": ["b"]}
    got = run_offline(_RESIDENT, str(model("tiny", dtype="float32")), config(paths, **extra), documents, QUESTION)
    for answers in got["answers"].values():
        assert max(differ(answer, answers[0]) for answer in answers) == 0
        assert len(answers) == 3
    assert got["stats"]["evictions"] >= 7
    assert got["stats"]["resident_bytes"] <= room
    for together, alone in zip(got["at once"], got["alone"], strict=True):
        assert differ(together, alone) < SAME
    assert got["at the end"]["injections_failed"] == 0
    assert got["at the end"]["in_use"] == 0
