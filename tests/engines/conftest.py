"""Tiny models, made once a session, and engines that are closed and checked when a test ends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from kvist.engines.hf import Engine
from kvist.engines.hf.model import Model
from kvist.testing.models import make_model

SMALL = {"layers": 2, "hidden": 64, "heads": 4, "kv_heads": 2, "vocab": 300, "max_len": 512}


@pytest.fixture(scope="session", autouse=True)
def two_threads() -> None:
    torch.set_num_threads(2)


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes a small model of a family, once for each set of arguments."""
    root = tmp_path_factory.mktemp("models")

    def make(family: str = "llama", **changes: Any) -> Path:
        name = "-".join([family, *(f"{key}={value}" for key, value in sorted(changes.items()))])
        path: Path = root / name
        return path if path.exists() else make_model(path, family, **(SMALL | changes))

    return make


@pytest.fixture(scope="session")
def model(model_dir: Callable[..., Path]) -> Callable[..., Model]:
    """Loads a small model, once for each set of arguments: it has no state, so engines can share it."""

    @cache
    def make(family: str, dtype: str | None, page_size_tokens: int) -> Model:
        return Model.load(model_dir(family), device="cpu", dtype=dtype, page_size_tokens=page_size_tokens, name="tiny")

    return make


@pytest.fixture
def load(model: Callable[..., Model]) -> Iterator[Callable[..., Engine]]:
    """Makes engines over small models, started; closes and checks them at the end."""
    engines: list[Engine] = []

    def make(
        family: str = "llama",
        *,
        dtype: str | None = None,
        page_size_tokens: int = 16,
        start: bool = True,
        pages: int = 64,
        **settings: Any,
    ) -> Engine:
        engine = Engine(model(family, dtype, page_size_tokens), pages=pages, **settings)
        engines.append(engine)
        return engine.start() if start else engine

    yield make
    for engine in engines:
        engine.close()
        engine.check_integrity()
