"""Cartridges on a real `vllm serve`, beside snapshots, with prefix caching on: the same bits as with the whole prompt.

The cartridges are made of what this server itself computes of three documents, and come to it through its registry
while it runs. Its kernels compute a request alike whatever runs beside it, so that answers can be compared with ==.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from cartridging import (
    ANSWER,
    BLOCK,
    CARTRIDGES,
    Book,
    ask,
    beside_snapshots,
    captured,
    first_difference,
    named,
    questions,
    without_ids,
)

from kvist.testing.answers import Completion
from kvist.testing.scenario.requests import GREEDY, at_once, error_of, prompt
from kvist.testing.vllm import VllmServer

LENGTHS = {"aligned": 3 * BLOCK, "long": 10 * BLOCK, "tail": 5 * BLOCK + 13}
"""Tokens of the documents."""
LONGEST = 4096


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cartridges")


@pytest.fixture(scope="module")
def server(
    store: str, root: Path, model: Callable[..., Path], start: Callable[..., VllmServer]
) -> Iterator[VllmServer]:
    config = beside_snapshots(store, {"registry": str(root / "registry.db")})
    server = start(model(), config=config, deterministic=True)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def books(server: VllmServer, store: str, root: Path) -> dict[str, Book]:
    """Three documents and their cartridges, which the server takes up without a restart."""
    found = {}
    for seed, (name, tokens) in enumerate(LENGTHS.items()):
        book = captured(server, store, root, name, prompt(tokens, seed=300 + seed))
        added = server.post(CARTRIDGES, {"path": str(book.path), "labels": {"subject": name}})
        assert (added["id"], added["tokens"], added["has_token_ids"]) == (name, tokens, True)
        found[name] = book
    return found


@pytest.fixture(autouse=True)
def alive(server: VllmServer) -> Iterator[None]:
    """After every test the server still serves, and nothing of its processes is gone."""
    before = server.processes()
    yield
    assert len(ask(server, [9, 8, 7]).steps) == ANSWER
    assert server.processes() == before


def assert_same(got: Completion, expected: Completion) -> None:
    assert got.steps == expected.steps, first_difference(got.steps, expected.steps)


# -- the same as the whole prompt ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
@pytest.mark.parametrize("length", [1, 9, BLOCK, 70])
def test_equal_to_the_document_in_the_prompt(
    server: VllmServer, books: dict[str, Book], name: str, length: int
) -> None:
    """In every log probability; and only the question is the client's."""
    book, question = books[name], prompt(length, seed=40)
    expected = ask(server, [*book.ids, *question], cache_salt=f"plain-{name}-{length}", max_tokens=40)
    got = ask(server, question, name, max_tokens=40)
    assert_same(got, expected)
    assert got.prompt_tokens == length
    assert got.cached_tokens == 0
    assert got.transfer is not None
    assert got.transfer["cartridge"]["id"] == name
    assert got.transfer["cartridge"]["tokens"] == len(book.ids)
    assert "directory" not in got.transfer["cartridge"]


def test_a_prompt_that_repeats_the_document_takes_the_same(server: VllmServer, books: dict[str, Book]) -> None:
    book, question = books["tail"], prompt(9, seed=40)
    whole = [*book.ids, *question]
    expected = ask(server, whole, cache_salt="repeats")
    got = ask(server, whole, "tail")
    assert_same(got, expected)
    assert got.prompt_tokens == len(whole)
    assert got.cached_tokens >= len(book.ids)


def test_one_that_does_not_know_its_document(server: VllmServer, books: dict[str, Book], root: Path) -> None:
    """As a trained one: what stands for its tokens is never computed."""
    book = without_ids(books["tail"], root)
    server.post(CARTRIDGES, {"path": str(book.path), "cartridge_id": "trained"})
    question = prompt(9, seed=41)
    expected = ask(server, [*book.ids, *question], cache_salt="as-trained")
    assert_same(ask(server, question, "trained"), expected)
    penalised = {"repetition_penalty": 1.3, "presence_penalty": 0.5}
    assert ask(server, question, "trained", **penalised).steps
    message = error_of(
        server.http.post("/v1/completions", json={"prompt": question, **named("trained", cartridge_prefix="prompt")}),
        400,
    )
    assert "knows no token ids" in message


def test_penalties_see_the_document(server: VllmServer, books: dict[str, Book]) -> None:
    book, question = books["aligned"], prompt(9, seed=42)
    penalised = {"repetition_penalty": 1.3, "frequency_penalty": 0.5}
    expected = ask(server, [*book.ids, *question], cache_salt="penalised", **penalised)
    assert_same(ask(server, question, "aligned", **penalised), expected)


def test_several_samples_of_one_request(server: VllmServer, books: dict[str, Book]) -> None:
    """``n`` requests of the engine's, one cartridge."""
    question = prompt(9, seed=43)
    body = {"n": 3, "max_tokens": 8, "temperature": 0.9, "seed": 7, "return_token_ids": True}
    got = server.post("/v1/completions", body | {"prompt": question, **named("tail")})
    plain = server.post("/v1/completions", body | {"prompt": [*books["tail"].ids, *question], "cache_salt": "n"})
    assert [one["token_ids"] for one in got["choices"]] == [one["token_ids"] for one in plain["choices"]]
    assert got["usage"]["prompt_tokens"] == 9


def test_chats_and_streams(server: VllmServer, books: dict[str, Book]) -> None:
    fields = {"max_tokens": ANSWER, **GREEDY}
    plain = server.chat(("user", "What is it?"), **fields)
    got = server.chat(("user", "What is it?"), **fields, **named("long"))
    assert got.steps != plain.steps
    assert got.prompt_tokens == plain.prompt_tokens
    stream = server.stream_chat(("user", "What is it?"), **fields, **named("long")).result()
    assert_same(stream, got)
    assert stream.prompt_tokens == plain.prompt_tokens
    question = prompt(9, seed=44)
    streamed = server.stream(question, **fields, **named("long")).result()
    assert_same(streamed, ask(server, question, "long"))
    assert (streamed.prompt_tokens, streamed.cached_tokens) == (9, 0)


# -- usage ---------------------------------------------------------------------------------------------------------


def _counters(server: VllmServer) -> dict[str, float]:
    found = {}
    for line in server.http.get("/metrics").text.splitlines():
        name = line.partition("{")[0]
        if line.startswith("vllm:") and "prompt_tokens" in name and name.endswith("_total"):
            source = line.partition('source="')[2].partition('"')[0]
            found[f"{name}/{source}"] = float(line.rsplit(" ", 1)[1])
    assert found
    return found


def test_prometheus_counts_what_clients_sent(server: VllmServer, books: dict[str, Book]) -> None:
    before = _counters(server)
    sent = 0
    for question in questions(5, seed=600):
        for name in (*books, None):
            assert ask(server, question, name).prompt_tokens == len(question)
            sent += len(question)
    grown = {name: value - before[name] for name, value in _counters(server).items()}
    assert all(value >= 0 for value in grown.values()), grown
    assert grown["vllm:prompt_tokens_total/"] == sent


def test_a_longer_prompt_is_cached_as_the_client_s(server: VllmServer, books: dict[str, Book]) -> None:
    """``cached_tokens`` are of the client's prompt, never of what stands before it."""
    question = prompt(4 * BLOCK, seed=45)
    assert ask(server, question, "aligned").cached_tokens == 0
    again = ask(server, question, "aligned")
    assert again.cached_tokens == 3 * BLOCK
    assert again.prompt_tokens == len(question)


# -- many at once, and in a row ------------------------------------------------------------------------------------


def test_two_hundred_at_once(server: VllmServer, books: dict[str, Book], note: Callable[[str], None]) -> None:
    """Over three cartridges and none, all mixed: each as it is alone, bit for bit."""
    asked = [(question, name) for question in questions(50) for name in (*books, None)]
    random.Random(1).shuffle(asked)
    started = time.monotonic()
    together = at_once([lambda q=question, n=name: ask(server, q, n) for question, name in asked])
    took = time.monotonic() - started
    for (question, name), got in zip(asked, together, strict=True):
        # a salt of its own: nothing is taken from the requests before
        alone = ask(server, question, name, cache_salt=f"alone-{name}-{len(question)}-{question[0]}")
        assert_same(got, alone)
        assert got.prompt_tokens == len(question)
    by_question = {(tuple(question), name): got.steps for (question, name), got in zip(asked, together, strict=True)}
    for question in questions(50):
        assert len({by_question[tuple(question), name] for name in (*books, None)}) == len(books) + 1
    note(f"cartridges: {len(asked)} requests at once over 3 and none: {took:.1f} s, all as alone")


def test_fifty_in_a_row(server: VllmServer, books: dict[str, Book]) -> None:
    question = prompt(17, seed=46)
    first = ask(server, question, "tail")
    for _ in range(50):
        assert_same(ask(server, question, "tail"), first)


# -- what is refused -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_an_unknown_id(server: VllmServer, books: dict[str, Book], path: str, stream: bool) -> None:
    """404, also where the answer is a stream; and the ids that there are."""
    asks = {
        "/v1/completions": {"prompt": "x"},
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/responses": {"input": "x"},
    }
    answer = server.http.post(path, json={**asks[path], "stream": stream, **named("nobody")})
    message = error_of(answer, 404)
    assert "nobody" in message
    assert "tail" in message


def test_through_openai_s_client(server: VllmServer, books: dict[str, Book]) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError, match="nobody"):
                client.completions.create(model=model, prompt="x", stream=stream, extra_body=named("nobody"))
            with pytest.raises(openai.NotFoundError, match="nobody"):
                client.chat.completions.create(
                    model=model,
                    messages=[{"role": "user", "content": "x"}],
                    stream=stream,
                    extra_body=named("nobody"),
                )
        said: Any = {"model": model, "messages": [{"role": "user", "content": "x"}], "temperature": 0, "max_tokens": 8}
        placed = client.chat.completions.create(**said, extra_body=named("tail"))
        plain = client.chat.completions.create(**said)
        assert placed.choices[0].message.content != plain.choices[0].message.content
        assert placed.usage is not None and plain.usage is not None
        assert placed.usage.prompt_tokens == plain.usage.prompt_tokens


def test_as_raw_http_has_it(server: VllmServer, books: dict[str, Book]) -> None:
    """Params nested in a literal ``extra_body``, and in ``vllm_xargs``."""
    question = prompt(9, seed=47)
    expected = ask(server, question, "tail")
    assert_same(ask(server, question, extra_body=named("tail")), expected)
    assert_same(ask(server, question, vllm_xargs={"cartridge_id": "tail"}), expected)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"prompt": [5] * (LONGEST - 100)}, f"109 tokens|has {LENGTHS['tail']} tokens"),
        ({"prompt": [5], "prompt_logprobs": 1}, "prompt_logprobs"),
        ({"prompt": [5], "echo": True, "logprobs": 1}, "echo with logprobs"),
        ({"prompt": [5], "use_beam_search": True, "n": 2}, "beam search"),
        ({"prompt": [5], "cache_salt": "kvist:cartridge:x"}, "cache_salt"),
        ({"prompt": [5], "kv_transfer_params": {"cartridge_id": "tail", "kvist_cartridge": {}}}, "kvist_cartridge"),
        ({"prompt": [5], "kv_transfer_params": {"cartridge_id": {"id": "tail"}}}, "cartridge_id"),
        ({"prompt": [5], "kv_transfer_params": {"cartridge_id": "tail", "cartridge_prefix": 3}}, "cartridge_prefix"),
        ({"prompt": [5], "kv_transfer_params": {"cartridge_id": "tail", "cartridge_prefix": "prompt"}}, "must begin"),
    ],
    ids=["too long", "prompt logprobs", "echo", "beam", "salt", "marker", "id", "prefix", "prompt"],
)
def test_what_cannot_be(server: VllmServer, books: dict[str, Book], fields: dict[str, Any], text: str) -> None:
    body = {"max_tokens": 4, **named("tail")} | fields
    for stream in (False, True) if "use_beam_search" not in fields else (False,):
        message = error_of(server.http.post("/v1/completions", json=body | {"stream": stream}), 400)
        assert any(one in message for one in text.split("|")), message


def test_what_a_refused_request_says_is_not_obeyed(server: VllmServer, books: dict[str, Book]) -> None:
    """vLLM tells its engine core what one said that names a remote prefill, past all that looks at requests."""
    used = ask(server, [5], "tail").transfer
    assert used is not None
    true = {name: used["cartridge"][name] for name in ("id", "identity", "tokens", "placed")} | {"skips": 0}
    expected = ask(server, [7, 8, 9])
    for changes in ({}, {"tokens": 10**9}, {"id": "evil/repo"}, {"directory": "evil/repo"}, {"skips": -(10**9)}):
        said = {"do_remote_prefill": True, "cartridge_id": "tail", "kvist_cartridge": {**true, **changes}}
        answer = server.http.post("/v1/completions", json={"prompt": [5], "max_tokens": 4, "kv_transfer_params": said})
        assert "kvist_cartridge" in error_of(answer, 400)
    assert_same(ask(server, [7, 8, 9], cache_salt="after"), expected)
    assert "evil/repo" not in server.log


def test_empty_prompts_are_refused_and_short_ones_answered(server: VllmServer, books: dict[str, Book]) -> None:
    for empty in ([], ""):
        answer = server.http.post("/v1/completions", json={"prompt": empty, "max_tokens": 4, **named("tail")})
        assert 400 <= answer.status_code < 500, answer.text
    assert len(ask(server, [5], "tail").steps) == ANSWER


def test_the_longest_that_fits(server: VllmServer, books: dict[str, Book]) -> None:
    """As many tokens as there is room for, cartridge and prompt counted."""
    room = 5
    question = prompt(LONGEST - LENGTHS["tail"] - room, seed=48)
    got = ask(server, question, "tail", max_tokens=LONGEST - len(question))  # all that vLLM itself would grant
    assert (len(got.steps), got.finish_reason) == (room, "length")
    whole = ask(server, [*books["tail"].ids, *question], cache_salt="longest", max_tokens=room)
    # chunks of a long prefill begin elsewhere: in bfloat16 up to 0.06 apart, where one lost token makes 0.3
    assert got.steps[0].token_id == whole.steps[0].token_id
    assert abs(got.steps[0].logprob - whole.steps[0].logprob) < 0.15


# -- other routes --------------------------------------------------------------------------------------------------

_CHAT = [{"role": "user", "content": "What is it?"}]
_SAMPLED = {"max_tokens": ANSWER, "temperature": 0.0}


def _routes(server: VllmServer) -> dict[str, dict[str, Any]]:
    """Bodies for routes beside OpenAI's, which not every vLLM has."""
    model = server.get("/v1/models")["data"][0]["id"]
    return {
        "/inference/v1/generate": {
            "token_ids": prompt(9, seed=52),
            "sampling_params": {**_SAMPLED, "ignore_eos": True},
        },
        "/v1/messages": {"model": model, "messages": _CHAT, **_SAMPLED},
        "/v1/chat/completions/batch": {"messages": [_CHAT, _CHAT], **_SAMPLED},
    }


def _takes_params(server: VllmServer, path: str) -> bool:
    """Whether the route's body has the field; vLLM drops what a body does not have."""
    document = server.get("/openapi.json")
    route = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    body = document["components"]["schemas"][route["$ref"].rpartition("/")[2]]
    return "kv_transfer_params" in body["properties"] or body.get("additionalProperties") is True


def _said(answer: dict[str, Any]) -> Any:
    """What was sampled, by whichever name."""
    choices = answer.get("choices")
    if choices is None:
        return answer["content"][0]["text"]
    return [choice.get("token_ids") or choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("path", ["/inference/v1/generate", "/v1/messages", "/v1/chat/completions/batch"])
def test_other_routes(server: VllmServer, books: dict[str, Book], path: str) -> None:
    """The cartridge that is named, or a refusal; never an answer without it."""
    if path not in server.get("/openapi.json")["paths"]:
        pytest.skip(f"this vLLM has no {path}")
    if not _takes_params(server, path):
        pytest.skip(f"{path} of this vLLM has no kv_transfer_params")
    body = _routes(server)[path]
    plain, placed = server.post(path, body), server.post(path, body | named("tail"))
    assert _said(placed) != _said(plain)
    if path == "/inference/v1/generate":
        assert _said(placed) == [ask(server, body["token_ids"], "tail").token_ids]
    else:
        expected = server.chat(("user", "What is it?"), **_SAMPLED, **named("tail")).text
        assert _said(placed) == ([expected] * 2 if path.endswith("batch") else expected)
    if not path.endswith("batch"):  # whose answer has no place for it
        assert placed["kv_transfer_params"]["cartridge"]["id"] == "tail"
    for params, status, text in (
        ({"cartridge_id": "nobody"}, 404, "nobody"),
        ({"cartridge_lable": "tail"}, 400, "kv_transfer_params.cartridge_lable: nobody reads"),
        ({"cartridge_id": "tail", "kvist_cartridge": {}}, 400, "only kvist itself"),
    ):
        for stream in (False, True) if not path.endswith("batch") else (False,):
            refused = server.http.post(path, json=body | {"stream": stream, "kv_transfer_params": params})
            assert refused.status_code == status, refused.text
            assert text in refused.text


_SHORT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x", "max_tokens": 2},
    "/v1/chat/completions": {"messages": _CHAT, "max_tokens": 2},
    "/v1/responses": {"input": "x", "max_output_tokens": 2},
}


@pytest.mark.parametrize("path", _SHORT)
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_a_field_that_nobody_reads(server: VllmServer, books: dict[str, Book], path: str, stream: bool) -> None:
    """Such as a misspelt one: refused, and not answered without a cartridge. Those of other connectors pass."""
    body = _SHORT[path] | {"stream": stream}
    for place in ("kv_transfer_params", "vllm_xargs"):
        message = error_of(server.http.post(path, json=body | {place: {"cartridge_lable": "tail"}}), 400)
        assert "cartridge_lable: nobody reads this field" in message
    others = {"do_remote_decode": False, "snapshot": None, "lmcache.tag.tenant": "a"}
    answer = server.http.post(path, json=body | {"kv_transfer_params": others})
    assert answer.status_code == 200, answer.text


# -- what comes and goes -------------------------------------------------------------------------------------------


def test_the_list(server: VllmServer, books: dict[str, Book]) -> None:
    listed = server.get(CARTRIDGES)
    assert listed["has_registry"] is True
    assert {record["id"] for record in listed["cartridges"]} >= set(books)
    one = server.get(f"{CARTRIDGES}/tail")
    assert one["labels"] == {"subject": "tail"}
    assert one["manifest"]["num_tokens_raw"] == LENGTHS["tail"]
    assert one["bytes"] > 0
    error_of(server.http.get(f"{CARTRIDGES}/nobody"), 404, "unknown_cartridge")


def test_removed_while_requests_use_it(server: VllmServer, books: dict[str, Book], root: Path) -> None:
    """Those that run go on to their end; the next one is refused; added again, it answers as before."""
    body = {"path": str(books["long"].path), "cartridge_id": "guest"}
    server.post(CARTRIDGES, body)
    question = prompt(9, seed=49)
    expected = ask(server, question, "guest", max_tokens=250, logprobs=0)
    streams = [server.stream(question, max_tokens=250, logprobs=0, **GREEDY, **named("guest")) for _ in range(4)]
    for stream in streams:
        stream.wait(5)
    assert server.http.delete(f"{CARTRIDGES}/guest").json() == {"id": "guest", "removed": True}
    error_of(server.http.delete(f"{CARTRIDGES}/guest"), 404, "unknown_cartridge")
    answer = server.http.post("/v1/completions", json={"prompt": question, **named("guest")})
    error_of(answer, 404)
    assert any(stream.is_live for stream in streams)
    for stream in streams:
        assert stream.result().steps == expected.steps
    server.post(CARTRIDGES, body)
    assert ask(server, question, "guest", logprobs=0).steps == expected.steps[:ANSWER]
    server.http.delete(f"{CARTRIDGES}/guest")


def test_what_cannot_be_added(server: VllmServer, books: dict[str, Book], root: Path) -> None:
    other = {"path": str(books["long"].path), "cartridge_id": "tail"}
    error_of(server.http.post(CARTRIDGES, json=other), 409, "already_exists")
    for body, status in (
        ({"path": str(root / "nowhere")}, {400, 404, 422}),
        ({"path": "relative"}, {400}),
        ({}, {400}),
        ({"path": "/x", "hub": "y"}, {400}),
        ({"store": "file:///x"}, {400}),
        ({"path": str(books["long"].path), "cartridge_id": "../x"}, {400}),
        ({"nonsense": 1}, {400}),
    ):
        answer = server.http.post(CARTRIDGES, json=body)
        assert answer.status_code in status, (body, answer.status_code, answer.text)
        assert answer.json()["error"]["message"]
    assert {record["id"] for record in server.get(CARTRIDGES)["cartridges"]} >= set(books)


def test_a_file_that_is_damaged_while_serving(server: VllmServer, books: dict[str, Book], root: Path) -> None:
    """Its load fails, and its requests with it; those of others do not notice; repaired, it is served."""
    running = server.stream(prompt(9, seed=50), max_tokens=200, logprobs=0, **GREEDY, **named("tail"))
    running.wait(5)
    twin = without_ids(books["long"], root)  # of another identity: nothing of it is in memory yet
    (shard,) = twin.path.glob("*.safetensors")
    good = shard.read_bytes()
    shard.chmod(0o644)
    shard.write_bytes(good[:-100] + bytes([good[-100] ^ 0x10]) + good[-99:])
    server.post(CARTRIDGES, {"path": str(twin.path), "cartridge_id": "damaged"})
    question = prompt(9, seed=51)
    for _ in range(2):
        answer = server.http.post("/v1/completions", json={"prompt": question, "max_tokens": 4, **named("damaged")})
        assert answer.status_code >= 500, answer.text
        assert answer.json()["error"]["message"]
    shard.write_bytes(good)
    assert_same(ask(server, question, "damaged"), ask(server, [*books["long"].ids, *question], cache_salt="repaired"))
    assert len(running.result().steps) == 200
    server.http.delete(f"{CARTRIDGES}/damaged")


# -- operators -----------------------------------------------------------------------------------------------------


def test_stats_say_what_was_loaded(server: VllmServer, books: dict[str, Book]) -> None:
    ask(server, prompt(9, seed=53), "long")  # so that it is in host memory

    def stats() -> dict[str, Any]:
        (rank,) = server.get("/v1/kvist/stats")["ranks"]
        return dict(rank)

    before = stats()
    ask(server, prompt(9, seed=54), "long", cache_salt="no block is there")
    after = stats()
    grown = {name: after[name] - before[name] for name in ("injections", "injections_failed", "pages_injected", "hits")}
    pages = LENGTHS["long"] // BLOCK
    assert grown == {"injections": 1, "injections_failed": 0, "pages_injected": pages, "hits": 1}
    assert after["bytes_injected"] - before["bytes_injected"] == pages * (
        after["bytes_injected"] / after["pages_injected"]
    )
    assert after["resident"] >= 1 and after["in_use"] == 0


def test_validate(server: VllmServer, books: dict[str, Book], note: Callable[[str], None]) -> None:
    """`kvist cartridge validate` against this server."""
    command = [sys.executable, "-m", "kvist", "cartridge", "validate", "--url", server.url, "--json"]
    command += [part for book in books.values() for part in ("--id", book.id, "--cartridge", f"{book.id}={book.path}")]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = json.loads(ran.stdout)
    assert report["passed"] is True
    outcomes = {tier["tier"]: tier["outcome"] for tier in report["tiers"]}
    assert outcomes == dict.fromkeys(["0", "0.5", "1", "1b", "2", "3", "4", "5"], "passed") | {"6": "skipped"}
    for tier in report["tiers"]:
        note(f"cartridge validate, tier {tier['tier']}: {tier['outcome']}: {tier['detail']}")
