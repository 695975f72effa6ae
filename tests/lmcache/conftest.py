"""Chunks without LMCache, and engines of a real LMCache where there is one.

LMCache lives in another environment than the rest (``make test-lmcache`` makes it and runs these tests there). Its
engine runs on a CPU: everything is its own but the connector between its memory and the model's KV cache, which 0.5.6
has for accelerators only; `PagedMemory` stands for both.
"""

from __future__ import annotations

import importlib.metadata
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvist.engines.paged.chunks import Chunks
from kvist.repo.repository import Repository

HAS_LMCACHE = any(importlib.metadata.distributions(name="lmcache"))
os.environ |= {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "ERROR"}
if HAS_LMCACHE:  # once, without its warnings, which would be errors here
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("lmcache.v1.cache_engine")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "lmcache: runs a real LMCache; skipped where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("lmcache"):
            item.add_marker(pytest.mark.filterwarnings("ignore"))
            if not HAS_LMCACHE:
                item.add_marker(pytest.mark.skip(reason="LMCache is not installed here: make test-lmcache"))


@pytest.fixture
def url(tmp_path: Path) -> str:
    """Of a store that does not exist yet."""
    return f"{(tmp_path / 'store').as_uri()}?durable=0"


@pytest.fixture
def chunks(url: str) -> Iterator[Callable[..., Chunks]]:
    """Opens the chunks in the store; closed at the end."""
    from no_lmcache import LAYOUT  # imports LMCache, if there is one

    opened: list[Chunks] = []

    def make(**options: Any) -> Chunks:
        options = {"max_bytes": 100 * 2 * LAYOUT.page_bytes, "refresh_s": 0.0} | options
        opened.append(Chunks(options.pop("repo", None) or Repository.open(url, create=True), LAYOUT, **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


@pytest.fixture
def engine(url: str) -> Iterator[Callable[..., Any]]:
    """Starts LMCache engines over the store; stopped at the end."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from real_lmcache import start, stop_all
    yield lambda **options: start(url, **options)
    stop_all()
