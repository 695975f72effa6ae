"""Servers with cartridges, and what is compared of their answers. Floats are compared with ==."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from kvist.cartridge.cartridge import Cartridge
from kvist.cartridge.model import ModelIdentity
from kvist.cartridge.snapshots import from_repository
from kvist.hashing.weights import revision
from kvist.repo import Repository
from kvist.testing.answers import Completion, Step
from kvist.testing.scenario.requests import GREEDY, SNAPSHOT, prompt
from kvist.testing.vllm import VllmServer

CARTRIDGES = "/v1/kvist/cartridges"
BLOCK = 32
ANSWER = 12
"""Tokens of an answer."""


def connector(extra: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """A ``--kv-transfer-config`` of the cartridge connector alone."""
    return {
        "kv_connector": "CartridgeConnector",
        "kv_connector_module_path": "kvist.engines.vllm.cartridges",
        "kv_role": "kv_both",
        **more,
        "kv_connector_extra_config": dict(extra),
    }


def beside_snapshots(store: str, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The same beside the connector for snapshots."""
    snapshots = {
        "kv_connector": "KvistConnector",
        "kv_connector_module_path": "kvist.engines.vllm.connector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"store": store},
    }
    return {
        "kv_connector": "MultiConnector",
        "kv_role": "kv_both",
        "kv_connector_extra_config": {"connectors": [snapshots, connector(extra)]},
    }


@dataclass(frozen=True)
class Book:
    """A document, and where its cartridge is."""

    id: str
    ids: list[int]
    path: Path

    def __str__(self) -> str:
        return self.id


def captured(server: VllmServer, store: str, root: Path, name: str, ids: list[int]) -> Book:
    """The cartridge of what this server itself computes of a document: a snapshot of a request, cut at its prompt."""
    stream = server.stream(ids, name=name, max_tokens=3000, cache_salt=name, logprobs=0, **GREEDY)
    stream.wait(1)
    answer = server.post(SNAPSHOT, {"request_id": stream.id})
    stream.close()
    with Repository.open(store) as repo:
        made = from_repository(repo, answer["cid"], tokens=len(ids), cartridge_id=name)
        assert made.token_ids == tuple(ids)
        return Book(name, ids, made.save_pretrained(root / name))


def without_ids(book: Book, root: Path) -> Book:
    """The same keys and values, by a cartridge that does not say its document's ids, as a trained one."""
    with Cartridge.from_pretrained(book.path) as whole:
        manifest = whole.manifest
        model = ModelIdentity(
            model_id=manifest.model_id,
            revision=manifest.model_revision,
            num_layers=manifest.num_layers,
            num_kv_heads=manifest.num_kv_heads,
            head_dim=manifest.head_dim,
            dtype=manifest.dtype,
        )
        layers = [whole.layer(at) for at in range(whole.num_layers)]
        layers = [(keys.clone(), values.clone()) for keys, values in layers]
    name = f"{book.id}-trained"
    made = Cartridge.create(layers, model, cartridge_id=name, training_steps=1)
    return Book(name, book.ids, made.save_pretrained(root / name))


def identity_of(model: Path, dtype: str) -> ModelIdentity:
    """Of a model's directory, with its weights pinned."""
    return ModelIdentity.of_directory(model, dtype=dtype, revision=revision(model))


def random_cartridge(root: Path, model: ModelIdentity, name: str, tokens: int) -> Path:
    """One as if trained: of no text, and unlike any other name's."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    shape = tokens, model.num_kv_heads, model.head_dim

    def tensor() -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, model.dtype))

    layers = [(tensor(), tensor()) for _ in range(model.num_layers)]
    return Cartridge.create(layers, model, cartridge_id=name, training_steps=1).save_pretrained(root / name)


def named(cartridge: str | None, **params: Any) -> dict[str, Any]:
    """The fields of a body that name a cartridge."""
    if cartridge is None and not params:
        return {}
    return {"kv_transfer_params": {**({"cartridge_id": cartridge} if cartridge is not None else {}), **params}}


def ask(server: VllmServer, ids: Sequence[int], cartridge: str | None = None, **fields: Any) -> Completion:
    """A greedy answer."""
    body = {"max_tokens": ANSWER, **GREEDY, **named(cartridge)} | fields
    return server.complete(ids, **body)


def questions(count: int, seed: int = 500) -> list[list[int]]:
    """Prompts of 1 to 40 tokens, no two alike."""
    return [prompt(1 + (7 * at) % 40, seed=seed + at) for at in range(count)]


def first_difference(got: Sequence[Step], expected: Sequence[Step]) -> str:
    """What two answers that must be equal differ in."""
    for at, (one, other) in enumerate(zip(got, expected, strict=False)):
        if one != other:
            return f"token {at}: {one} is not {other}"
    return f"{len(got)} tokens, expected {len(expected)}"
