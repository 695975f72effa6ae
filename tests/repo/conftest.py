from collections.abc import Iterator
from pathlib import Path

import pytest

from kvist.repo import Repository
from kvist.store import LocalStore, MemoryStore, Store

pytest.register_assert_rewrite("kvist.testing.repo", "kvist.testing.repo_model")


@pytest.fixture(params=["memory", "local"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    return MemoryStore() if request.param == "memory" else LocalStore(tmp_path / "store", durable=False)


@pytest.fixture
def repo(store: Store) -> Iterator[Repository]:
    with Repository.init(store) as opened:
        yield opened
