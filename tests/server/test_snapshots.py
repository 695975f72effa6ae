"""Snapshot, fork, checkout and continue over real HTTP."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kvist.engines.hf import Engine
from kvist.pager.convert import layouts_of
from kvist.repo import RefKind, gc, lease

from .conftest import Api, error_of, serving

PROMPT = [(11 * n) % 450 + 10 for n in range(45)]
SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 5}


def logits_of(answer: Any) -> bytes:
    return base64.b64decode(answer["choices"][0]["kvist"]["logits"])


def test_twelve_forks_equal_the_main_line(own: Api) -> None:
    main = own.complete(PROMPT, max_tokens=30, kvist={"logits": True}, **SAMPLED)
    ids = main["choices"][0]["token_ids"]
    row = 4 * own.engine.model.vocab
    start = own.complete(PROMPT, max_tokens=10, **SAMPLED)
    taken = own.fork("snapshot", request_id=start["id"])
    assert taken["tokens"] == len(PROMPT) + 9
    assert taken["new_bytes"] > 0
    forks = own.fork("fork", cid=taken["cid"], n=12)
    assert len(set(forks["cids"])) == len(forks["branches"]) == 12
    for number, rev in enumerate([*forks["cids"][:6], *forks["branches"][6:]]):
        if number % 2:
            own.fork("checkout", cid=rev)
        answer = own.complete(
            None, max_tokens=20, kv_transfer_params={"snapshot": rev, "sequence": start["id"]}, kvist={"logits": True}
        )
        assert answer["choices"][0]["token_ids"] == ids[10:]
        assert logits_of(answer) == logits_of(main)[10 * row :]
        assert answer["choices"][0]["prompt_token_ids"] == PROMPT + ids[:10]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) + 9
        child = own.fork("snapshot", request_id=answer["id"])
        assert child["parents"] == [own.get(f"/v1/processfork/snapshots/{rev}")["cid"]]


def test_tells_the_layout_of_its_pages(own: Api) -> None:
    answer = own.http.get("/v1/processfork/layout")
    assert layouts_of(answer.content, "answer") == [own.engine.layout]
    assert answer.json()["numerics"] == own.engine.numerics()


def test_another_engine_continues_bit_for_bit(
    own: Api, load: Callable[..., Engine], model_dir: Path, tmp_path: Path
) -> None:
    main = own.complete(PROMPT, max_tokens=24, kvist={"logits": True}, **SAMPLED)
    part = own.complete(PROMPT, max_tokens=7, **SAMPLED)
    own.fork("snapshot", request_id=part["id"], name="kept", message="for later")
    with load(pages=64) as other, serving(other, own.repo, model_dir) as api:
        assert api.get("/v1/processfork/sequences") == {"sequences": []}
        done = api.fork("checkout", cid="kept")
        (sequence,) = done["sequences"]
        assert done["ok"] is done["bit_exact"] is True
        assert done["restored_tokens"] == len(PROMPT) + 6
        assert done["pages"] == done["pages_loaded"] > 0
        assert sequence["id"] == part["id"]
        assert sequence["engine_id"] == f"{done['cid'][7:19]}/{part['id']}"
        again = api.fork("checkout", cid="kept")
        assert again["pages_loaded"] == 0
        assert again["sequences"] == done["sequences"]
        assert [info["id"] for info in api.get("/v1/processfork/sequences")["sequences"]] == [sequence["engine_id"]]
        answer = api.complete(None, max_tokens=17, kv_transfer_params={"snapshot": "kept"}, kvist={"logits": True})
        assert answer["choices"][0]["token_ids"] == main["choices"][0]["token_ids"][7:]
        assert logits_of(answer) == logits_of(main)[7 * 4 * other.model.vocab :]
        assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) + 6
        # a capture after a checkout copies only what is new
        taken = api.fork("snapshot")
        assert taken["parents"] == [done["cid"]]
        assert taken["pages_copied"] < taken["pages"]
        # what is dropped comes back on demand
        assert api.http.delete(f"/v1/processfork/sequences/{sequence['engine_id']}").status_code == 200
        error_of(api.http.delete(f"/v1/processfork/sequences/{sequence['engine_id']}"), 404, "not_found")
        assert (
            api.tokens(None, max_tokens=17, kv_transfer_params={"snapshot": "kept"})
            == answer["choices"][0]["token_ids"]
        )
        other.check_integrity()


def test_continue_with_a_longer_prompt_and_with_new_parameters(own: Api) -> None:
    start = own.complete(PROMPT, max_tokens=5, **SAMPLED)
    known = PROMPT + start["choices"][0]["token_ids"]
    transfer = {"snapshot": own.fork("snapshot", request_id=start["id"])["cid"]}
    more = [9, 8, 7]
    answer = own.complete(known + more, max_tokens=6, kv_transfer_params=transfer)
    assert answer["choices"][0]["prompt_token_ids"] == known + more
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] >= len(known) - 1
    assert own.tokens(known, max_tokens=6, kv_transfer_params=transfer) == own.tokens(
        None, max_tokens=6, kv_transfer_params=transfer
    )
    # greedy from here is what greedy says of these tokens; a new seed is that seed's
    greedy = own.complete(None, max_tokens=6, temperature=0, kv_transfer_params=transfer)
    assert greedy["choices"][0]["token_ids"] == own.tokens(known, max_tokens=6, temperature=0)
    assert greedy["usage"]["prompt_tokens_details"]["cached_tokens"] == len(known) - 1
    seeded = own.tokens(None, max_tokens=6, seed=77, kv_transfer_params=transfer)
    assert seeded == own.tokens(known, max_tokens=6, **{**SAMPLED, "seed": 77})
    # several choices are several futures, the first of them the one that would have come
    several = own.complete(None, n=3, max_tokens=8, kv_transfer_params=transfer)["choices"]
    assert several[0]["token_ids"] == own.tokens(None, max_tokens=8, kv_transfer_params=transfer)
    assert len({tuple(choice["token_ids"]) for choice in several}) == 3
    assert own.tokens(None, max_tokens=6, temperature=1.5, kv_transfer_params=transfer) == own.tokens(
        None, max_tokens=6, temperature=1.5, kv_transfer_params=transfer
    )


@pytest.mark.parametrize("prompt", [[1, 2, 3], PROMPT[:-1], "some text"])
def test_a_prompt_that_is_not_the_snapshots(own: Api, prompt: Any) -> None:
    start = own.complete(PROMPT, max_tokens=2)
    cid = own.fork("snapshot", request_id=start["id"])["cid"]
    body = {"prompt": prompt, "kv_transfer_params": {"snapshot": cid}}
    error = error_of(own.post("/v1/completions", body), 400, "invalid_input")
    assert error["param"] == "prompt"
    assert str(len(PROMPT) + 2) in error["message"]


def test_which_sequence_must_be_said(own: Api) -> None:
    answer = own.complete(PROMPT, n=2, max_tokens=3, **SAMPLED)
    taken = own.fork("snapshot", request_id=answer["id"])
    names = [seq["id"] for seq in taken["sequences"]]
    assert names == [f"{answer['id']}/0", f"{answer['id']}/1"]
    body: dict[str, Any] = {"kv_transfer_params": {"snapshot": taken["cid"]}}
    assert names[1] in error_of(own.post("/v1/completions", body), 400, "invalid_input")["message"]
    body["kv_transfer_params"]["sequence"] = "other"
    error_of(own.post("/v1/completions", body), 404, "not_found")
    transfer = {"snapshot": taken["cid"], "sequence": names[1]}
    ids = own.complete(None, max_tokens=1, kv_transfer_params=transfer)["choices"][0]["prompt_token_ids"]
    assert ids == PROMPT + answer["choices"][1]["token_ids"]
    one = own.fork("checkout", cid=taken["cid"], sequences=[names[0]])
    assert [seq["id"] for seq in one["sequences"]] == [names[0]]


def test_what_was_moved_is_counted(own: Api, load: Callable[..., Engine], model_dir: Path) -> None:
    answer = own.complete(PROMPT, max_tokens=4)
    taken = own.fork("snapshot", request_id=answer["id"], name="kept")
    half = own.engine.layout.page_bytes
    stats = own.get("/v1/processfork/stats")
    assert (stats["pages_captured"], stats["bytes_captured"]) == (taken["pages"], 2 * half * taken["pages"])
    assert (stats["loads"], stats["pages_read"], stats["pages_loaded"]) == (0, 0, 0)
    again = own.fork("snapshot", request_id=answer["id"], parents=[])
    after = own.get("/v1/processfork/stats")
    assert after["pages_captured"] - stats["pages_captured"] == again["pages_copied"] > 0
    assert after["bytes_captured"] == stats["bytes_captured"], "the repository had it"
    with load(pages=64) as other, serving(other, own.repo, model_dir) as api:
        api.fork("checkout", cid="kept", preload=True, verify=False)
        api.fork("checkout", cid="kept")
        stats = api.get("/v1/processfork/stats")
        assert (stats["loads"], stats["loads_failed"]) == (1, 0)
        assert stats["pages_read"] == stats["pages_loaded"] == taken["pages"]
        assert stats["bytes_loaded"] == 2 * half * taken["pages"]
        assert stats["load_seconds"] > 0


def test_a_checkout_says_what_cannot_go_on_exactly(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = own.complete(PROMPT, max_tokens=2)
    cid = own.fork("snapshot", request_id=answer["id"])["cid"]
    done = own.fork("checkout", cid=cid)
    assert (done["bit_exact"], done["differences"], done["not_carried"]) == (True, {}, {})
    numerics = own.engine.numerics()
    monkeypatch.setattr(own.engine, "numerics", lambda: numerics | {"threads": 99})
    done = own.fork("checkout", cid=cid)
    assert done["bit_exact"] is False
    assert done["differences"] == {"threads": {"snapshot": numerics["threads"], "engine": 99}}


def test_a_store_that_is_gone(own: Api, tmp_path: Path) -> None:
    cid = own.fork("snapshot", request_id=own.complete(PROMPT, max_tokens=2)["id"])["cid"]
    (tmp_path / "store").rename(tmp_path / "elsewhere")
    for path, body in (
        ("/v1/processfork/checkout", {"cid": cid}),
        ("/v1/processfork/fork", {"cid": cid}),
        ("/v1/completions", {"kv_transfer_params": {"snapshot": cid}}),
    ):
        assert "is the disk mounted?" in error_of(own.post(path, body), 503, "store")["message"]
    for path in ("snapshots", "lineage", f"snapshots/{cid}"):
        error_of(own.http.get(f"/v1/processfork/{path}"), 503, "store")
    error_of(own.http.get("/v1/models/other"), 404, "not_found")


def test_chats_continue_too(own: Api) -> None:
    messages = [{"role": "user", "content": "hello"}]
    start = own.complete(messages, chat=True, max_tokens=4, temperature=0)
    whole = own.complete(messages, chat=True, max_tokens=10, temperature=0)["choices"][0]["token_ids"]
    transfer = {"snapshot": own.fork("snapshot", request_id=start["id"])["cid"]}
    assert own.tokens(chat=True, max_tokens=6, kv_transfer_params=transfer) == whole[4:]


def test_heads_names_and_branches(own: Api) -> None:
    for info in own.get("/v1/processfork/sequences")["sequences"]:
        own.http.delete(f"/v1/processfork/sequences/{info['id']}")
    own.engine.clear_prefix_cache()
    first = own.complete(PROMPT, max_tokens=3)
    one = own.fork("snapshot")
    assert (one["branch"], one["name"], one["parents"]) == ("main", None, [])
    two = own.fork("snapshot", message="again")
    assert two["parents"] == [one["cid"]]
    assert (two["pages_copied"], two["new_bytes"]) == (1, 0)  # the page that is not full
    named = own.fork("snapshot", name="demo", sequence=first["id"])
    assert (named["branch"], named["name"], named["parents"]) == ("demo", "demo", [two["cid"]])
    both = own.fork("snapshot", name="free text, no branch", branch="demo/x", sequence=first["id"])
    assert (both["branch"], both["name"]) == ("demo/x", "free text, no branch")
    assert both["parents"] == [named["cid"]]
    # what a branch named stays reachable
    other = own.complete(PROMPT[:5], max_tokens=3)
    moved = own.fork("snapshot", name="demo", sequence=other["id"])
    assert moved["parents"] == [named["cid"]]
    body = {"name": "demo", "sequence": other["id"], "parents": [one["cid"]]}
    error_of(own.post("/v1/processfork/snapshot", body), 409, "conflict")
    given = own.fork("snapshot", branch="given", sequence=other["id"], parents=[one["cid"], "demo"])
    assert given["parents"] == [one["cid"], moved["cid"]]

    listed = own.get("/v1/processfork/snapshots")
    assert listed["total"] == 6
    assert {record["cid"] for record in listed["snapshots"]} == {
        s["cid"] for s in (one, two, named, both, moved, given)
    }
    assert own.get("/v1/processfork/snapshots?rev=main&limit=1") == {
        "snapshots": [own.get("/v1/processfork/snapshots?rev=main")["snapshots"][0]], "total": 2,
    }  # fmt: skip
    error_of(own.http.get("/v1/processfork/snapshots?limit=none"), 400, "invalid_input")
    error_of(own.http.get("/v1/processfork/snapshots?rev=nope"), 404, "not_found")
    for rev in (both["cid"], "demo/x", both["cid"][7:15]):
        shown = own.get(f"/v1/processfork/snapshots/{rev}")
        assert shown["cid"] == both["cid"]
        assert shown["refs"] == [{"kind": "branch", "name": "demo/x"}]
        assert shown["layout"]["model"] == "tiny"
        assert shown["layout"]["fingerprint"] == own.engine.layout.fingerprint
        assert shown["sequences"][0]["token_ids"][: len(PROMPT)] == PROMPT
    lineage = own.get("/v1/processfork/lineage")
    assert {node["cid"] for node in lineage["nodes"]} == {record["cid"] for record in listed["snapshots"]}
    assert {"child": two["cid"], "parent": one["cid"]} in lineage["edges"]
    assert {"kind": "branch", "name": "main", "cid": two["cid"]} in lineage["refs"]
    assert lineage["heads"] == [two["cid"]]
    heads = {info["id"]: info["head"] for info in own.get("/v1/processfork/sequences")["sequences"]}
    assert heads == {first["id"]: both["cid"], other["id"]: given["cid"]}


def test_ids_do_not_grow_from_checkout_to_checkout(own: Api) -> None:
    answer = own.complete(PROMPT, max_tokens=2)
    cid = own.fork("snapshot", request_id=answer["id"])["cid"]
    for _ in range(3):
        (sequence,) = own.fork("checkout", cid=cid)["sequences"]
        assert sequence["engine_id"] == f"{cid[7:19]}/{answer['id']}"
        cid = own.fork("snapshot", sequence=sequence["engine_id"])["cid"]


def test_unknown_things(own: Api) -> None:
    error_of(own.post("/v1/processfork/snapshot", {"request_id": "cmpl-none"}), 404, "not_found")
    error_of(own.post("/v1/processfork/snapshot", {"sequence": "none"}), 404, "not_found")
    error_of(own.post("/v1/processfork/snapshot", {"parents": ["none"]}), 404, "not_found")
    for cid in ("none", "sha256:" + "0" * 64, "../../etc/passwd"):
        assert own.post("/v1/processfork/checkout", {"cid": cid}).status_code in (400, 404)
        assert own.post("/v1/processfork/fork", {"cid": cid, "n": 2}).status_code in (400, 404)
        assert own.post("/v1/completions", {"kv_transfer_params": {"snapshot": cid}}).status_code in (400, 404)
    cid = own.fork("snapshot")["cid"]
    error_of(own.post("/v1/processfork/checkout", {"cid": cid, "sequences": ["none"]}), 404, "not_found")
    error_of(own.post("/v1/processfork/fork", {"cid": cid, "n": 0}), 400, "invalid_input")
    own.fork("fork", cid=cid, n=2, name="f")
    error_of(own.post("/v1/processfork/fork", {"cid": cid, "n": 1, "name": "f"}), 409, "already_exists")


def test_many_at_once(own: Api) -> None:
    answer = own.complete(PROMPT, max_tokens=3)
    base = own.fork("snapshot", request_id=answer["id"])["cid"]
    own.engine.drop(answer["id"])
    own.engine.clear_prefix_cache()
    with ThreadPoolExecutor(8) as threads:
        outs = list(threads.map(lambda _: own.fork("checkout", cid=base), range(8)))
        assert sum(out["pages_loaded"] > 0 for out in outs) == 1
        taken = list(threads.map(lambda _: own.fork("snapshot"), range(8)))
    line = [record["cid"] for record in own.get("/v1/processfork/snapshots?rev=main")["snapshots"]]
    assert {snapshot["cid"] for snapshot in taken} == set(line[:-1])
    assert line[-1] == base
    (sequence,) = outs[0]["sequences"]
    transfer = {"snapshot": base}
    with ThreadPoolExecutor(8) as threads:
        # evicted between a checkout and the submit that needs it, it is checked out again
        drops = threads.map(lambda _: own.http.delete(f"/v1/processfork/sequences/{sequence['engine_id']}"), range(4))
        body = {"max_tokens": 4, "seed": 1, "kv_transfer_params": transfer}
        futures = list(threads.map(lambda _: own.tokens(None, **body), range(8)))
        assert {drop.status_code for drop in drops} <= {200, 404}
    assert len(set(map(tuple, futures))) == 1
    own.engine.check_integrity()


def test_a_sequence_ended_by_a_stop_string_goes_on_with_its_draws(own: Api) -> None:
    whole = own.complete(PROMPT, max_tokens=24, **SAMPLED)["choices"][0]
    stop = whole["text"][6:9]
    first = own.complete(PROMPT, max_tokens=24, stop=[stop], **SAMPLED)
    ids = first["choices"][0]["token_ids"]
    assert first["choices"][0]["finish_reason"] == "stop"
    assert len(ids) < 24
    transfer = {"snapshot": own.fork("snapshot", request_id=first["id"])["cid"]}
    assert ids + own.tokens(None, max_tokens=24 - len(ids), kv_transfer_params=transfer) == whole["token_ids"]


def test_a_snapshot_goes_on_after_its_checkout_was_captured_again(own: Api) -> None:
    answer = own.complete(PROMPT, max_tokens=4, **SAMPLED)
    first = own.fork("snapshot", request_id=answer["id"])["cid"]
    expected = own.tokens(None, max_tokens=6, kv_transfer_params={"snapshot": first})
    own.fork("checkout", cid=first)
    second = own.fork("snapshot")["cid"]
    assert own.tokens(None, max_tokens=6, kv_transfer_params={"snapshot": first}) == expected
    transfer = {"snapshot": second, "sequence": f"{first[7:19]}/{answer['id']}"}
    assert own.tokens(None, max_tokens=6, kv_transfer_params=transfer) == expected


def test_parameters_equal_to_the_snapshots_go_on(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    submit, overrides = own.engine.submit, []

    def noting(*args: Any, **more: Any) -> Any:
        overrides.append(dict(more["override"]))
        return submit(*args, **more)

    monkeypatch.setattr(own.engine, "submit", noting)
    settings = SAMPLED | {"stop_token_ids": [511]}
    whole = own.tokens(PROMPT, max_tokens=16, **settings)
    answer = own.complete(PROMPT, max_tokens=6, **settings)
    transfer = {"snapshot": own.fork("snapshot", request_id=answer["id"])["cid"]}
    going_on = own.complete(None, max_tokens=10, kv_transfer_params=transfer, n=2, **settings)["choices"]
    assert going_on[0]["token_ids"] == whole[6:]
    assert going_on[1]["token_ids"] != whole[6:]
    assert overrides[-2:] == [{}, {"seed": 6}]
    assert own.tokens(None, max_tokens=10, kv_transfer_params=transfer, top_k=0) == whole[6:]
    anew = own.tokens(None, max_tokens=10, kv_transfer_params=transfer, **settings | {"seed": 6})
    assert anew == own.tokens(PROMPT + whole[:6], max_tokens=10, **settings | {"seed": 6})


def test_copies_that_an_eviction_cut_short_are_submitted_again(own: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = own.complete(PROMPT, max_tokens=4, **SAMPLED)
    transfer = {"snapshot": own.fork("snapshot", request_id=answer["id"])["cid"]}
    expected = own.complete(None, max_tokens=5, n=3, kv_transfer_params=transfer)["choices"]
    submit, names = own.engine.submit, []

    def evicting(*args: Any, **settings: Any) -> Any:
        names.append(settings["sequence_id"])
        if len(names) == 2:
            own.engine.drop(settings["resume"])
        return submit(*args, **settings)

    monkeypatch.setattr(own.engine, "submit", evicting)
    again = own.complete(None, max_tokens=5, n=3, kv_transfer_params=transfer)["choices"]
    assert [choice["token_ids"] for choice in again] == [choice["token_ids"] for choice in expected]
    assert len(names) == len(set(names)) == 5


def test_heads_of_sequences_that_are_gone_are_forgotten(own: Api) -> None:
    answer = own.complete(PROMPT, max_tokens=2)
    base = own.fork("snapshot", request_id=answer["id"])["cid"]
    for cid in own.fork("fork", cid=base, n=4)["cids"]:
        (sequence,) = own.fork("checkout", cid=cid)["sequences"]
        own.engine.drop(sequence["engine_id"])
    assert list(own.sessions._engine_heads) == [cid]


def test_a_gc_leaves_what_the_engine_continues(own: Api) -> None:
    answer = own.complete(PROMPT, max_tokens=2)
    base = own.fork("snapshot", request_id=answer["id"], name="demo")["cid"]
    own.fork("checkout", cid=base)
    while base not in lease.read(own.repo.store).cids:
        time.sleep(0.01)
    own.repo.delete_ref(RefKind.BRANCH, "demo")
    assert base not in gc.apply(own.repo, gc.plan(own.repo, min_age=0)).snapshots
    assert own.fork("snapshot", request_id=answer["id"])["parents"] == [base]
    own.sessions.close()
    assert not lease.read(own.repo.store).live
