"""Backends over one new store, for the tests of HiCache."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hicache_pools import Open, backend, mha

from kvist.engines.sglang.hicache import KvistHiCache


@pytest.fixture
def store_url(tmp_path: Path) -> str:
    """Of a store that does not exist yet."""
    return f"{(tmp_path / 'store').as_uri()}?durable=0"


@pytest.fixture
def open_backend(store_url: str) -> Iterator[Open]:
    """Opens backends over that store, each with a host pool; closed at the end."""
    made: list[KvistHiCache] = []

    def make(pool: Any | None = None, *, url: str = store_url, **how: Any) -> KvistHiCache:
        made.append(backend(url, mha() if pool is None else pool, **how))
        return made[-1]

    yield make
    for each in made:
        each.close()
