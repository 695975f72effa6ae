"""Cartridges over HTTP: chosen by the request, told apart in usage, added and removed while the server runs."""

from __future__ import annotations

import json
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.config import CartridgeConfig
from kvist.cartridge.registry import Registry
from kvist.cartridge.snapshots import from_repository
from kvist.engines.hf import Engine
from kvist.repo import Repository
from kvist.server.offer import open_offer

from .conftest import Api, error_of, serving
from .test_serve import ready, start

DOCUMENT = "The twig was found on the third of May by the gardener, and it was given the name of Kvist. " * 3
QUESTION = "Who found the twig?"
GREEDY: dict[str, Any] = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}


def trained(engine: Engine, tokens: int, seed: int, name: str) -> Cartridge:
    """Keys and values that no text has."""
    layout, generator = engine.layout, torch.Generator().manual_seed(seed)
    shape = (tokens, layout.n_heads, layout.head_dim)
    layers = [
        (torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))
        for _ in range(layout.n_layers)
    ]
    return Cartridge.create(
        layers, engine.model.identity, cartridge_id=name, training_steps=9, labels={"topic": name[0]}
    )


@pytest.fixture(scope="module")
def cartridges(api: Api, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of them: ``doc``, captured from the engine over HTTP, and two that training could have made."""
    root = tmp_path_factory.mktemp("cartridges")
    answer = api.complete(DOCUMENT, max_tokens=0)
    cid = api.fork("snapshot", request_id=answer["id"], name="doc")["cid"]
    model = api.engine.model.identity
    cartridge = from_repository(api.repo, cid, model=model, cartridge_id="doc", labels={"topic": "d"})
    assert cartridge.token_ids == tuple(api.tokenizer.encode(DOCUMENT))
    cartridge.save_pretrained(root / "doc")
    trained(api.engine, 40, 1, "first").save_pretrained(root / "first")
    trained(api.engine, 48, 2, "second").save_pretrained(root / "second")
    return root


@pytest.fixture
def opened(
    load: Callable[..., Engine], model_dir: Path, cartridges: Path, tmp_path: Path
) -> Iterator[Callable[..., Api]]:
    """Starts servers with cartridges, each on an engine of its own."""
    ends: list[Any] = []

    def make(*, pages: int = 512, **extra: Any) -> Api:
        if not extra:
            names = ("doc", "first", "second")
            extra = {"cartridges": [{"cartridge_id": name, "path": str(cartridges / name)} for name in names]}
        repo = Repository.open(str(tmp_path / "store"), create=True)
        engine = load(pages=pages).start()
        offer = open_offer(engine, CartridgeConfig.from_extra(extra | {"cache_dir": str(tmp_path / "cache")}))
        server = serving(engine, repo, model_dir, offer=offer)
        api = server.__enter__()
        ends.append((server, engine, offer, repo))
        return api

    yield make
    for server, engine, offer, repo in ends:
        server.__exit__(None, None, None)
        engine.close()
        engine.check_integrity()
        offer.library.close()
        repo.close()


def using(name: str, **more: Any) -> dict[str, Any]:
    return {"kv_transfer_params": {"cartridge_id": name, **more}}


def test_a_question_after_a_cartridge_is_the_whole_prompt(api: Api, opened: Callable[..., Api]) -> None:
    """The text says the same, and usage counts the question alone."""
    server = opened()
    ids, question = api.tokenizer.encode(DOCUMENT), api.tokenizer.encode(QUESTION, special=False)
    kvist = {"kvist": {"logits": True}}
    whole = api.complete(ids + question, **GREEDY, **kvist)["choices"][0]
    answer = server.complete(question, **GREEDY, **kvist, **using("doc"))
    choice = answer["choices"][0]
    assert {**choice, "prompt_token_ids": None} == {**whole, "prompt_token_ids": None}
    assert choice["prompt_token_ids"] == question
    manifest = Cartridge.from_pretrained(_path(server, "doc")).manifest
    told = {"id": "doc", "identity": manifest.identity, "tokens": len(ids), "placed": True}
    assert answer["kv_transfer_params"] == {"cartridge": told}
    assert answer["usage"] == {
        "prompt_tokens": len(question),
        "completion_tokens": 12,
        "total_tokens": len(question) + 12,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    again = server.complete(question, **GREEDY, **using("doc"))
    assert again["usage"]["prompt_tokens_details"] == {"cached_tokens": len(question) - 1}
    plain = server.complete(question, **GREEDY)
    assert "kv_transfer_params" not in plain
    assert plain["choices"][0]["token_ids"] == api.tokens(question, **GREEDY)


def _path(server: Api, name: str) -> Path:
    return server.engine.cartridges.library.get(name).directory  # type: ignore[union-attr]


def test_the_openai_client_and_streams(opened: Callable[..., Api]) -> None:
    server = opened()
    expected = server.complete(QUESTION, **GREEDY, **using("first"))["choices"][0]["text"]
    messages: Any = [{"role": "user", "content": QUESTION}]
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        whole = client.completions.create(
            model="tiny",
            prompt=QUESTION,
            max_tokens=12,
            temperature=0,
            extra_body={"ignore_eos": True, **using("first")},
        )
        assert whole.choices[0].text == expected
        assert whole.model_extra is not None
        assert whole.model_extra["kv_transfer_params"]["cartridge"]["id"] == "first"
        chunks = list(
            client.completions.create(
                model="tiny",
                prompt=QUESTION,
                max_tokens=12,
                temperature=0,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True, **using("first")},
            )
        )
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == expected
        told = [
            chunk.model_extra["kv_transfer_params"] for chunk in chunks if "kv_transfer_params" in chunk.model_extra
        ]
        assert [one["cartridge"]["tokens"] for one in told] == [40]
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens == len(server.tokenizer.encode(QUESTION))
        chat = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=5, temperature=0, extra_body=using("second")
        )
        without = client.chat.completions.create(model="tiny", messages=messages, max_tokens=5, temperature=0)
        assert chat.usage is not None
        assert without.usage is not None
        assert chat.usage.prompt_tokens == without.usage.prompt_tokens
        assert chat.choices[0].message.content != without.choices[0].message.content
        for stream in (False, True):
            with pytest.raises(openai.NotFoundError) as raised:
                client.completions.create(model="tiny", prompt="x", stream=stream, extra_body=using("nobody"))
            assert raised.value.code == "unknown_cartridge"
            with pytest.raises(openai.NotFoundError):
                client.chat.completions.create(model="tiny", messages=messages, stream=stream, extra_body=using("no"))


def test_choices_prompts_and_seeds(opened: Callable[..., Api]) -> None:
    server = opened()
    body = {"max_tokens": 8, "seed": 3, "n": 2, **using("first")}
    both = server.complete(["one", "two"], **body)
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    alone = [server.complete(text, **body)["choices"] for text in ("one", "two")]
    ids = [choice["token_ids"] for choices in alone for choice in choices]
    assert [choice["token_ids"] for choice in both["choices"]] == ids
    assert both["usage"]["prompt_tokens"] == sum(len(server.tokenizer.encode(text)) for text in ("one", "two"))


def test_how_the_prompt_begins(opened: Callable[..., Api]) -> None:
    server = opened()
    document = server.tokenizer.encode(DOCUMENT)
    question = server.tokenizer.encode(QUESTION, special=False)
    auto = server.complete(document + question, **GREEDY, **using("doc"))
    assert not auto["kv_transfer_params"]["cartridge"]["placed"]
    assert auto["usage"]["prompt_tokens"] == len(document + question)
    assert auto["usage"]["prompt_tokens_details"]["cached_tokens"] == len(document)
    strict = server.complete(document + question, **GREEDY, **using("doc", cartridge_prefix="prompt"))
    assert strict["choices"] == auto["choices"]
    placed = server.complete(question, **GREEDY, **using("doc", cartridge_prefix="virtual"))
    assert placed["choices"][0]["token_ids"] == auto["choices"][0]["token_ids"]
    twice = server.complete(document + question, **GREEDY, **using("doc", cartridge_prefix="virtual"))
    assert twice["kv_transfer_params"]["cartridge"]["placed"]
    for mode, word in (("prompt", "must begin with"), ("sometimes", "one of auto, virtual, prompt")):
        answer = server.post("/v1/completions", {"prompt": question, **using("doc", cartridge_prefix=mode)})
        assert word in error_of(answer, 400, "invalid_input")["message"]


def test_what_is_refused(opened: Callable[..., Api]) -> None:
    server = opened()
    limit = server.engine.max_model_len
    cases: list[tuple[dict[str, Any], int, str, str]] = [
        ({**using("nobody")}, 404, "unknown_cartridge", "nobody"),
        ({"kv_transfer_params": {"cartridge_id": True}}, 400, "invalid_input", "cartridge_id"),
        ({"kv_transfer_params": {"cartridge": "doc"}}, 400, "invalid_input", "cartridge"),
        (
            {"prompt": [5] * (limit - 40), **using("first")},
            400,
            "invalid_input",
            "here, and the cartridge has 40",
        ),
        ({"max_tokens": limit - 41, **using("first")}, 400, "invalid_input", "the cartridge has 40 tokens, the prompt"),
        ({"prompt": [], **using("first")}, 400, "invalid_input", "at least one token"),
        ({"kv_transfer_params": {"snapshot": "x", "cartridge_id": "doc"}}, 400, "invalid_input", "keeps the cartridge"),
    ]
    for body, status, code, word in cases:
        for stream in (False, True):
            answer = server.post("/v1/completions", {"prompt": [5, 6, 7], "stream": stream, **body})
            assert word in error_of(answer, status, code)["message"]
    (rank,) = server.get("/v1/kvist/stats")["ranks"]
    assert (rank["in_use"], rank["failures"]) == (0, 0)
    fits = {"prompt": [5] * (limit - 41), "max_tokens": 1, **using("first")}
    assert server.post("/v1/completions", fits).status_code == 200


def test_one_configured_cartridge_is_the_default(opened: Callable[..., Api], cartridges: Path) -> None:
    server = opened(cartridge_path=str(cartridges / "first"), preload=["first"])
    assert server.engine.cartridges.metrics().resident == 1
    answer = server.complete(QUESTION, **GREEDY)
    assert answer["kv_transfer_params"]["cartridge"]["id"] == "first"
    cid = server.fork("snapshot", request_id=answer["id"])["cid"]
    on = server.complete(None, max_tokens=3, kv_transfer_params={"snapshot": cid})
    assert on["kv_transfer_params"] == answer["kv_transfer_params"], "the sequence's own, and not one more"
    several = opened(
        cartridges=[{"path": str(cartridges / name)} for name in ("first", "second")],
        router={"type": "composite", "routers": [{"type": "label", "label_key": "topic"}, {"type": "explicit"}]},
        unknown="compute",
    )
    by_label = several.complete(QUESTION, kv_transfer_params={"cartridge_label": "s"}, **GREEDY)
    assert by_label["kv_transfer_params"]["cartridge"]["id"] == "second"
    for nobody in ({"cartridge_label": "x"}, {"cartridge_id": 42}, {}):
        assert "kv_transfer_params" not in several.complete(QUESTION, kv_transfer_params=nobody, **GREEDY)


def test_a_session_with_a_cartridge_is_snapshotted_forked_and_checked_out(opened: Callable[..., Api], own: Api) -> None:
    """``own`` is a server on the same store, and has no cartridges."""
    server = opened()
    whole = server.complete(QUESTION, **GREEDY | {"max_tokens": 24}, **using("first"))["choices"][0]
    part = server.complete(QUESTION, **GREEDY, **using("first"))
    done = server.fork("snapshot", request_id=part["id"], name="session")
    (told,) = done["sequences"]
    question, first = server.tokenizer.encode(QUESTION), part["choices"][0]["token_ids"]
    assert told["cartridge"]["id"] == "first"
    assert told["tokens"] == 40 + len(question) + 12
    forks = server.fork("fork", cid=done["cid"], n=3, name="try")["branches"]
    for rev in ("session", *forks):
        on = server.complete(None, max_tokens=12, kv_transfer_params={"snapshot": rev})
        assert first + on["choices"][0]["token_ids"] == whole["token_ids"]
        assert on["choices"][0]["prompt_token_ids"] == question + first
        assert on["usage"]["prompt_tokens"] == len(question) + 12
        assert on["usage"]["prompt_tokens_details"]["cached_tokens"] == len(question) + 11
    repeated = server.complete([*question, *first, 9], max_tokens=2, kv_transfer_params={"snapshot": "session"})
    assert repeated["usage"]["prompt_tokens"] == len(question) + 13
    (listed,) = [one for one in server.get("/v1/processfork/sequences")["sequences"] if one["id"] == part["id"]]
    assert listed["cartridge"] == "first"
    on = own.complete(None, max_tokens=12, kv_transfer_params={"snapshot": "session"})
    assert first + on["choices"][0]["token_ids"] == whole["token_ids"]
    assert on["kv_transfer_params"] == part["kv_transfer_params"]


def test_two_hundred_requests_at_once_equal_isolated_ones(opened: Callable[..., Api]) -> None:
    server, isolated = opened(pages=60), opened()
    random_ = random.Random(5)
    jobs = [
        (random_.choice(["doc", "first", "second", None]), random_.choice([QUESTION, "Why?", DOCUMENT[:90]]))
        for _ in range(200)
    ]

    def ask(api: Api, job: tuple[str | None, str]) -> Any:
        name, text = job
        answer = api.complete(text, **GREEDY, **(using(name) if name else {}))
        return answer["choices"][0]["token_ids"], answer["usage"]["prompt_tokens"], answer.get("kv_transfer_params")

    expected = {job: ask(isolated, job) for job in set(jobs)}
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(lambda job: ask(server, job), jobs)) == [expected[job] for job in jobs]
    assert server.engine.cartridges.metrics().in_use == 0


def test_cartridges_come_and_go_through_the_registry(
    opened: Callable[..., Api], cartridges: Path, tmp_path: Path
) -> None:
    server = opened(registry=str(tmp_path / "registry.db"))
    assert server.get("/v1/kvist/cartridges") == {"cartridges": [], "default": None, "has_registry": True}
    error_of(server.post("/v1/completions", {"prompt": "x", **using("first")}), 404, "unknown_cartridge")
    added = server.post(
        "/v1/kvist/cartridges", {"cartridge_id": "mine", "path": str(cartridges / "first"), "labels": {"a": "b"}}
    )
    assert added.status_code == 200, added.text
    assert (added.json()["id"], added.json()["tokens"]) == ("mine", 40)
    answer = server.complete(QUESTION, **GREEDY, **using("mine"))
    assert answer["kv_transfer_params"]["cartridge"]["id"] == "mine"
    assert [one["id"] for one in server.get("/v1/kvist/cartridges")["cartridges"]] == ["mine"]
    stream = server.events({"prompt": QUESTION, "max_tokens": 300, "ignore_eos": True, **using("mine")})
    next(stream)
    assert server.http.delete("/v1/kvist/cartridges/mine").status_code == 200
    error_of(server.post("/v1/completions", {"prompt": "x", **using("mine")}), 404, "unknown_cartridge")
    assert list(stream)[-1]["choices"][0]["finish_reason"] == "length"
    error_of(server.http.delete("/v1/kvist/cartridges/mine"), 404, "unknown_cartridge")
    with Registry(tmp_path / "registry.db") as registry:  # as another process does
        registry.register(Cartridge.from_pretrained(cartridges / "second").manifest, str(cartridges / "second"))
    assert server.complete(QUESTION, **GREEDY, **using("second"))["kv_transfer_params"]["cartridge"]["tokens"] == 48


def test_a_damaged_file_fails_its_requests_and_no_others(
    opened: Callable[..., Api], cartridges: Path, tmp_path: Path
) -> None:
    shutil.copytree(cartridges / "first", tmp_path / "bad")
    server = opened(
        cartridges=[{"cartridge_id": "bad", "path": str(tmp_path / "bad")}, {"path": str(cartridges / "second")}]
    )
    shard = next((tmp_path / "bad").glob("*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-5] ^= 0x10
    shard.write_bytes(data)
    good = server.complete(QUESTION, **GREEDY, **using("second"))["choices"]
    results: list[Any] = []

    def ask(name: str) -> None:
        results.append((name, server.post("/v1/completions", {"prompt": QUESTION, **GREEDY, **using(name)})))

    threads = [threading.Thread(target=ask, args=(name,)) for name in ("bad", "second", "bad", "second")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, answer in results:
        if name == "bad":
            error_of(answer, 500, "damaged_cartridge")
        else:
            assert answer.json()["choices"][0]["text"] == good[0]["text"]


def test_a_wrong_model_keeps_the_server_from_starting(
    opened: Callable[..., Api], cartridges: Path, model_dir: Path, tmp_path: Path
) -> None:
    from kvist.errors import LayoutMismatch

    other = tmp_path / "other"
    shutil.copytree(cartridges / "first", other)
    manifest = json.loads((other / "cartridge.json").read_text())
    manifest["model_revision"] = "blake3:0000"
    (other / "cartridge.json").write_text(json.dumps(manifest))
    with pytest.raises(LayoutMismatch, match=r"(?s)revision.*blake3:0000"):
        opened(cartridge_path=str(other))


def test_serve_with_cartridges(model_dir: Path, cartridges: Path, tmp_path: Path) -> None:
    named = [option for name in ("doc", "first") for option in ("--cartridge", f"{name}={cartridges / name}")]
    process = start(
        model_dir, *named, "--registry", str(tmp_path / "registry.db"), "--cartridge-config", '{"unknown": "compute"}',
        KVIST_STORE=str(tmp_path / "store"),
    )  # fmt: skip
    url, _ = ready(process)
    with process, httpx2.Client(base_url=url, timeout=None) as client:
        try:
            names = [one["id"] for one in client.get("/v1/kvist/cartridges").json()["cartridges"]]
            assert names == ["doc", "first"]
            body = {"prompt": QUESTION, "max_tokens": 2, **using("first")}
            assert client.post("/v1/completions", json=body).json()["kv_transfer_params"]["cartridge"]["id"] == "first"
            body = {"prompt": QUESTION, "max_tokens": 2, **using("nobody")}
            assert "kv_transfer_params" not in client.post("/v1/completions", json=body).json()
        finally:  # leaving the block waits for the process
            process.send_signal(signal.SIGTERM)
        assert process.wait() == 0


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--cartridge", "doc"], "ID=PATH"),
        (["--cartridge", "doc=/nowhere"], "nowhere"),
        (["--cartridge-config", "{"], "not JSON"),
        (["--cartridge-config", "[]"], "a JSON object"),
        (["--cartridge-config", '{"strange": 1}'], "strange"),
        (["--cartridge", "a=b", "--cartridge-config", '{"cartridges": []}'], "an option gives too"),
    ],
)
def test_options_that_cannot_be_right(options: list[str], word: str, model_dir: Path, tmp_path: Path) -> None:
    process = start(model_dir, *options, KVIST_STORE=str(tmp_path / "store"))
    _, told = process.communicate()
    assert process.returncode != 0
    assert word in told
    assert "Traceback" not in told


def test_options_are_read_before_the_model(tmp_path: Path) -> None:
    process = start(tmp_path / "nowhere", "--cartridge-config", '{"strange": 1}', KVIST_STORE=str(tmp_path / "store"))
    _, told = process.communicate()
    assert process.returncode != 0
    assert "strange" in told and "nowhere" not in told


def test_every_route_is_in_the_reference() -> None:
    from kvist.server.cartridges import cartridge_routes

    page = (Path(__file__).parents[2] / "docs/reference/http.md").read_text()
    routes = [(route.path, route.methods) for route in cartridge_routes(lambda: None)]  # type: ignore[arg-type, return-value]
    for path, methods in [*routes, ("/v1/kvist/stats", {"GET"})]:
        (method,) = (methods or set()) - {"HEAD"}
        assert f"## `{method} {path.replace(':path', '')}`" in page
