"""A repository that has a history, and the page over it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from kvist.repo import Repository
from kvist.server.access import Access, Guard
from kvist.server.seeing import Seeing
from kvist.server.ui.app import create_ui

from .sample import fill

Open = Callable[..., TestClient]


@pytest.fixture
def repo(tmp_path: Path) -> Iterator[Repository]:
    with Repository.open(str(tmp_path / "conversations"), create=True) as repo:
        yield repo


@pytest.fixture
def filled(repo: Repository) -> Repository:
    fill(repo, 40)
    return repo


@pytest.fixture
def browse() -> Open:
    """A client of the page, as `kvist ui` puts it together; it follows no redirect."""

    def open(repo: Repository, *, write: bool = True, access: Access | None = None, **settings: object) -> TestClient:
        app = create_ui(repo, Seeing(may_write=write), **settings)  # type: ignore[arg-type]
        guarded = Guard(app, access or Access())
        return TestClient(guarded, base_url="http://127.0.0.1", follow_redirects=False)

    return open
