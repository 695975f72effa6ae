"""`LiveScenario`: what an engine contributes to the scenarios, and the servers that they start with it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Final

import pytest

from kvist.testing.live import LiveServer
from kvist.testing.models import make_shape
from kvist.testing.scenario.requests import TOTAL, Case, cases

NAMES: Final = tuple(f"{mode}-{n}" for n in ("1", "page-1", "page", "page+1", "500") for mode in ("greedy", "seeded"))
"""Requests by their sampling and the tokens of their prompts."""

Start = Callable[..., LiveServer]
"""``start(store, company=False, of=model)``: a server that answers, ended with the class at the latest."""


class LiveScenario(ABC):
    """One engine, by how it is started. Give `serve`; the rest has defaults.

    Attributes:
        page_size: tokens a page of the servers that `serve` starts.
        salts: whether requests may bring a ``cache_salt`` that keeps their blocks apart. Without, what must share no
            cache is asked of a server of its own.
        total: tokens that a request samples; of an engine so fast that it would end before it is snapshotted, more.
    """

    page_size: ClassVar[int] = 32
    salts: ClassVar[bool] = True
    total: ClassVar[int] = TOTAL

    @classmethod
    @abstractmethod
    def serve(cls, model: Path, store: str, *, company: bool = False) -> LiveServer:
        """Start a server with kvist, and return when it answers.

        Args:
            model: the model's directory. A sequence must have room for 8192 tokens.
            store: url of the repository, which may not exist yet.
            company: what a request computes must not depend, in any bit, on what runs beside it. Without, it may: the
                scenario then asks one thing at a time.
        """

    @classmethod
    def make_model(cls, directory: Path, *, seed: int = 0) -> Path:
        """Make a model there that `serve` can serve; of another seed, one that differs in its weights only."""
        return make_shape(directory, "tiny", dtype="bfloat16", seed=seed)

    @classmethod
    def cases(cls, *, seed: int = 0) -> dict[str, Case]:
        """The requests of `NAMES`. Where a page is so small that two of them were of one length, some are longer."""
        page = cls.page_size
        lengths = (1, max(page - 1, 2), max(page, 3), max(page + 1, 4), 500)
        return dict(zip(NAMES, cases(lengths, seed), strict=True))

    @classmethod
    def note(cls, text: str) -> None:
        """Take what a scenario found and does not judge."""
        print(text)

    @pytest.fixture(scope="class")
    @classmethod
    def model(cls, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The model's directory."""
        return cls.make_model(tmp_path_factory.mktemp("scenario") / "model")

    @pytest.fixture(scope="class")
    @classmethod
    def store(cls, tmp_path_factory: pytest.TempPathFactory) -> str:
        """Url of the class's store, which does not exist yet."""
        return (tmp_path_factory.mktemp("kv") / "store").as_uri()

    @pytest.fixture(scope="class")
    @classmethod
    def start(cls, model: Path) -> Iterator[Start]:
        """Starts servers; what is left of them at the end is killed."""
        servers: list[LiveServer] = []

        def start(store: str, *, company: bool = False, of: Path = model) -> LiveServer:
            servers.append(cls.serve(of, store, company=company))
            return servers[-1]

        yield start
        for server in servers:
            server.kill()
