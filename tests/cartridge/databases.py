"""Fixtures: an empty registry's url, once of each database; and manifests for it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sql

from kvist.cartridge.manifest import CartridgeManifest, FileEntry, LayerShape
from kvist.cartridge.registry import Registry

from . import postgres


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[sql.URL]:
    with postgres.server() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """Where a registry can be made."""
    if request.param == "sqlite":
        yield str(tmp_path / "registry.db")
        return
    with postgres.database(request.getfixturevalue("postgres_server")) as made:
        yield made


@pytest.fixture
def registry(url: str) -> Iterator[Registry]:
    with Registry(url) as made:
        yield made


def manifest(cartridge_id: str = "a", **fields: Any) -> CartridgeManifest:
    """A manifest for a small model, whose content is named by ``content``."""
    content = hashlib.sha256(fields.pop("content", cartridge_id).encode()).hexdigest()
    told: dict[str, Any] = {
        "model_id": "org/tiny",
        "num_layers": 1,
        "num_kv_heads": 2,
        "head_dim": 4,
        "dtype": "float32",
        "num_tokens_raw": 20,
        "num_tokens_aligned": 16,
        "block_size": 16,
        "num_blocks": 1,
        "has_frozen_prefix": False,
        "checksum": content,
        "layers": (LayerShape(num_kv_heads=2, head_dim=4),),
        "files": (FileEntry(name="kv.safetensors", size=1280, sha256=content),),
        "file_size_bytes": 1280,
    }
    return CartridgeManifest(cartridge_id=cartridge_id, **(told | fields))
