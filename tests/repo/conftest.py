import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from kvist.repo import Repository
from kvist.store import LocalStore, MemoryStore, Store, open_store


@pytest.fixture
def new_store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[str], Store]]:
    """A new store of a kind at every call; skips where its server is not installed."""
    numbers = itertools.count()
    with contextlib.ExitStack() as stack:

        def new(kind: str) -> Store:
            match kind:
                case "memory":
                    return MemoryStore()
                case "local":
                    return LocalStore(tmp_path / f"store{next(numbers) or ''}", durable=False)
                case "oci":
                    return open_store(f"oci:{tmp_path}/layout:v1")
                case server:
                    return stack.enter_context(open_store(request.getfixturevalue(server).new_url()))

        yield new


@pytest.fixture(params=["memory", "local", "moto", "seaweed"])
def store_kind(request: pytest.FixtureRequest) -> str:
    """Each kind; of object storage two servers, which share no code."""
    return str(request.param)


@pytest.fixture
def store(new_store: Callable[[str], Store], store_kind: str) -> Store:
    """A new store of each kind."""
    return new_store(store_kind)


@pytest.fixture
def repo(store: Store) -> Iterator[Repository]:
    with Repository.init(store) as opened:
        yield opened


@pytest.fixture
def target(new_store: Callable[[str], Store], store_kind: str) -> Iterator[Repository]:
    """A second repository, empty, in a store of the same kind."""
    with Repository.init(new_store(store_kind)) as opened:
        yield opened
