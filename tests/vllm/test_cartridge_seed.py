"""The configurations that vLLM's first CartridgeConnector documented, with nothing changed but the module's path.

The checkpoints are made as its guide makes them: with plain transformers, by torch.save. `vllm serve` is started with
no setting of kvist's own, and asked as the guide asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cartridging import ask, named

from kvist.testing.scenario.requests import at_once, error_of
from kvist.testing.vllm import VllmServer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BOUND = 0.2
"""Log probabilities of two engines in bfloat16; the guide's own measure was 0.16 in logits."""
AS_INSTALLED = {"VLLM_PLUGINS": None}

SINGLE = """{
    "kv_connector": "CartridgeConnector",
    "kv_connector_module_path":
      "kvist.engines.vllm.cartridges",
    "kv_connector_extra_config": {
      "cartridge_path": "canary.pt"
    },
    "kv_role": "kv_both"
  }"""
SEVERAL = """{
    "kv_connector": "CartridgeConnector",
    "kv_connector_module_path":
      "kvist.engines.vllm.cartridges",
    "kv_connector_extra_config": {
      "cartridges": [
        {"cartridge_id": "doc_a", "path": "cart_a.pt"},
        {"cartridge_id": "doc_b", "path": "cart_b.pt"}
      ],
      "router": {"type": "explicit"}
    },
    "kv_role": "kv_both"
  }"""
TEXTS = {
    "canary": "The store of the keys is in the north. A branch of a tree is a twig, and the dogs are sleeping there.",
    "cart_a": "Every twig can grow in the morning sun. The quick brown fox is the answer to the first question.",
    "cart_b": "The other dogs jump over the lazy fox. Continue from there as often as the user of the tree has asked.",
}
QUESTION = " What is the answer?"


class Guide:
    """The model of the guide's script, and what it computes of a text."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tok = transformers.AutoTokenizer.from_pretrained(path)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()

    def save(self, text: str, checkpoint: Path) -> None:
        ids = self.tok.encode(text, add_special_tokens=False)
        cache = transformers.DynamicCache()
        with torch.no_grad():
            self.model(input_ids=torch.tensor([ids]), past_key_values=cache, use_cache=True, return_dict=True)
        keys, values = [], []
        for li in range(len(cache.layers)):
            layer = cache.layers[li]
            keys.append(layer.keys.cpu() if hasattr(layer, "keys") else layer.key_cache[0].cpu())
            values.append(layer.values.cpu() if hasattr(layer, "values") else layer.value_cache[0].cpu())
        torch.save(
            {"trainable_keys": keys, "trainable_values": values, "frozen_keys": [], "frozen_values": []}, checkpoint
        )

    def logprobs(self, ids: list[int]) -> Any:
        with torch.no_grad():
            return torch.log_softmax(self.model(input_ids=torch.tensor([ids])).logits[0, -1].float(), -1)

    def encode(self, text: str) -> list[int]:
        return list(self.tok.encode(text, add_special_tokens=False))


@pytest.fixture(scope="module")
def guide(model: Callable[..., Path]) -> Guide:
    return Guide(model())


@pytest.fixture(scope="module")
def here(guide: Guide, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory, with the checkpoints."""
    root = tmp_path_factory.mktemp("guide")
    for name, text in TEXTS.items():
        guide.save(text, root / f"{name}.pt")
    return root


def serve(start: Callable[..., VllmServer], guide: Guide, here: Path, config: str) -> VllmServer:
    home = {"XDG_CACHE_HOME": str(here / "cache")}
    return start(guide.path, config=config, cwd=here, env=AS_INSTALLED | home)


def difference(server: VllmServer, guide: Guide, text: str, cartridge: str | None) -> float:
    """Between vLLM's first token after the question and transformers' after text and question."""
    question = guide.encode(QUESTION)
    got = ask(server, question, cartridge, max_tokens=1).steps[0]
    expected = guide.logprobs([*guide.encode(text), *question])
    return max(abs(expected[token].item() - logprob) for token, logprob in got.top)


@pytest.fixture(scope="module")
def single(start: Callable[..., VllmServer], guide: Guide, here: Path) -> Iterator[VllmServer]:
    server = serve(start, guide, here, SINGLE)
    yield server
    server.stop()


def test_one_cartridge(single: VllmServer, guide: Guide, here: Path, note: Callable[[str], None]) -> None:
    """Every request uses it, and answers as after the text itself; not as after another."""
    assert difference(single, guide, TEXTS["canary"], None) < BOUND
    assert difference(single, guide, TEXTS["cart_a"], None) > 5 * BOUND
    assert difference(single, guide, "", None) > 5 * BOUND
    note(f"cartridges: canary.pt beside transformers: {difference(single, guide, TEXTS['canary'], None):.3f}")
    got = ask(single, guide.encode(QUESTION))
    assert got.transfer is not None
    assert got.transfer["cartridge"]["tokens"] == len(guide.encode(TEXTS["canary"]))


def test_the_guide_s_request(single: VllmServer, guide: Guide) -> None:
    """As its curl sends it: the text and the question in a chat."""
    body = {
        "model": str(guide.path),
        "messages": [{"role": "user", "content": TEXTS["canary"] + QUESTION}],
        "max_tokens": 50,
        "temperature": 0,
    }
    answer = single.post("/v1/chat/completions", body)
    assert answer["usage"]["completion_tokens"] > 0
    assert answer["kv_transfer_params"]["cartridge"]["tokens"] == len(guide.encode(TEXTS["canary"]))


def test_sixteen_at_once_and_fifty_in_a_row(single: VllmServer, guide: Guide) -> None:
    question = guide.encode(QUESTION)
    first = ask(single, question).steps[0]
    for got in at_once([lambda: ask(single, question)] * 16) + [ask(single, question) for _ in range(50)]:
        assert got.steps[0].token_id == first.token_id
        assert abs(got.steps[0].logprob - first.logprob) < BOUND


def test_several_cartridges(start: Callable[..., VllmServer], guide: Guide, here: Path) -> None:
    """Each request by the guide's own body, with its params nested as no API has them."""
    server = serve(start, guide, here, SEVERAL)
    for name in ("doc_a", "doc_b"):
        text = TEXTS[name.replace("doc", "cart")]
        assert difference(server, guide, text, name) < BOUND
        body = {
            "model": str(guide.path),
            "messages": [{"role": "user", "content": f"{text} Question?"}],
            "max_tokens": 50,
            "temperature": 0,
            "extra_body": {"kv_transfer_params": {"cartridge_id": name}},
        }
        answer = server.post("/v1/chat/completions", body)
        assert answer["kv_transfer_params"]["cartridge"]["id"] == name
    assert difference(server, guide, "", None) < BOUND
    assert difference(server, guide, TEXTS["cart_a"], "doc_b") > 5 * BOUND
    for stream in (False, True):
        body = {"prompt": "x", "stream": stream, **named("doc_c")}
        assert "doc_a, doc_b" in error_of(server.http.post("/v1/completions", json=body), 404)
    server.stop()
