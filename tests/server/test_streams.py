"""Streams while other things happen: snapshots, forks, checkouts, drops, and clients that go away."""

from __future__ import annotations

import json
import logging
import socket
import threading
import time
from urllib.parse import urlsplit

import pytest

from .conftest import Api, error_of

LONG = {"prompt": "Once upon a time", "max_tokens": 120, "seed": 3, "temperature": 0.8, "ignore_eos": True}


def wait_until_idle(api: Api) -> None:
    while api.running():
        time.sleep(0.01)


def ids_of(events: list[dict]) -> list[int]:  # type: ignore[type-arg]
    return [token for event in events for token in event["choices"][0]["token_ids"]]


def test_streams_are_never_disturbed(own: Api) -> None:
    undisturbed = own.tokens(LONG["prompt"], **{k: v for k, v in LONG.items() if k != "prompt"})
    other = own.complete("Another one", max_tokens=20, seed=1)
    base = own.fork("snapshot", request_id=other["id"])["cid"]
    results: list[list[int]] = [[], []]

    def stream(number: int) -> None:
        body = LONG | {"return_token_ids": True}
        results[number] = ids_of(list(own.events(body, **{"X-Request-Id": f"stream-{number}"})))

    threads = [threading.Thread(target=stream, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    rounds = 0
    cids = []
    while any(thread.is_alive() for thread in threads):
        taken = own.post("/v1/processfork/snapshot", {"request_id": "stream-0"})
        if taken.status_code == 200:  # else it has not begun yet
            cids.append(taken.json()["cid"])
        own.fork("snapshot")
        (fork,) = own.fork("fork", cid=base, n=1)["cids"]
        (sequence,) = own.fork("checkout", cid=fork)["sequences"]
        own.tokens(None, max_tokens=3, kv_transfer_params={"snapshot": fork})
        assert own.http.delete(f"/v1/processfork/sequences/{sequence['engine_id']}").status_code == 200
        own.engine.clear_prefix_cache()
        rounds += 1
    for thread in threads:
        thread.join()
    assert rounds
    assert results == [undisturbed, undisturbed]
    # each snapshot of the live stream goes on to the same end
    for cid in cids[:: max(1, len(cids) // 3)]:
        (sequence,) = own.get(f"/v1/processfork/snapshots/{cid}")["sequences"]
        ids = sequence["token_ids"]
        done = len(ids) - len(own.tokenizer.encode("Once upon a time"))
        rest = own.tokens(None, max_tokens=max(1, 120 - done), kv_transfer_params={"snapshot": cid})
        assert rest[: 120 - done] == undisturbed[done:]
    own.engine.check_integrity()


def test_a_snapshot_waits_for_a_request_to_start(own: Api) -> None:
    events = own.events(LONG | {"max_tokens": 30}, **{"X-Request-Id": "soon"})
    next(events)
    taken = own.fork("snapshot", request_id="soon", name="live")
    assert taken["sequences"][0]["tokens"] > 0
    list(events)


def test_a_stream_that_is_dropped_says_so(own: Api) -> None:
    events = own.events(LONG | {"max_tokens": 1500})
    name = next(events)["id"]
    assert own.http.delete(f"/v1/processfork/sequences/{name}").status_code == 200
    *_, last = events
    assert last["choices"][0]["finish_reason"] == "abort"
    error_of(own.post("/v1/processfork/snapshot", {"request_id": name}), 404, "not_found")


def test_a_client_that_leaves_a_stream_frees_it(own: Api) -> None:
    with own.http.stream("POST", "/v1/completions", json=LONG | {"stream": True, "max_tokens": 1900, "n": 2}) as answer:
        lines = answer.iter_lines()
        name = json.loads(next(lines).removeprefix("data: "))["id"]
        assert own.running()
    wait_until_idle(own)
    listed = [info["id"] for info in own.get("/v1/processfork/sequences")["sequences"]]
    assert not any(name in other for other in listed)
    own.engine.check_integrity()


def test_a_client_that_does_not_wait_for_its_answer_frees_it(own: Api) -> None:
    body = json.dumps(LONG | {"max_tokens": 1900}).encode()
    address = urlsplit(own.url)
    with socket.create_connection((address.hostname, address.port)) as client:
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        while not own.running():
            time.sleep(0.01)
    wait_until_idle(own)
    own.engine.check_integrity()


def test_a_client_that_leaves_while_it_sends_is_no_bug(own: Api, caplog: pytest.LogCaptureFixture) -> None:
    address = urlsplit(own.url)
    with caplog.at_level(logging.INFO):
        for path in ("/v1/completions", "/v1/processfork/snapshot"):
            with socket.create_connection((address.hostname, address.port)) as client:
                client.sendall(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{{".encode())
                own.get("/health")
        time.sleep(0.2)
    assert not [record for record in caplog.records if record.exc_info]
